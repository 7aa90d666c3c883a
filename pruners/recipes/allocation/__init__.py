"""Allocation rules: from layers that share a budget, evidence, and the share to remove, to removed units a layer."""
