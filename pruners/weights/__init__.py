"""Pruning of single weights: metrics, masks, reconstructions, formulas."""
