"""Pruning of whole blocks: scores of blocks, and merging into the kept blocks."""
