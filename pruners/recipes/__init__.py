"""Recipes: plans of pruning, made from calibration data, metric, allocation and repair."""
