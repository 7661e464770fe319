"""Data: raw files, datasets, tokens, bags of words, and batches of them."""
