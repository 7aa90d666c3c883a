"""Stores on disk: one file a block, memory-mapped, with a key of their content."""
