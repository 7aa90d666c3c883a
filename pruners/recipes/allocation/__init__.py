"""Allocation rules: how many units each layer loses at a sparsity."""
