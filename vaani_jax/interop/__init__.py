"""Models in the formats of other tools: Hugging Face folders and GGUF files.

`convert` holds the two commands; `names` is the one table that both directions use.
"""
