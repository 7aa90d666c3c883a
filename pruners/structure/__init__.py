"""Structured pruning of KV groups with their query heads, FFN channels and whole sub-layers."""
