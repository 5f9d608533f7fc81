"""A run on disk: checkpoints, rows of metrics, curves."""
