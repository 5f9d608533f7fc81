"""Text to training batches: sources, corpora, windows."""
