"""Pruning: model families, calibration, metrics, masks, reconstruction, cutting, recipes, export."""
