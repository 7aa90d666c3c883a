"""Allocations: a level of sparsity for each unit."""
