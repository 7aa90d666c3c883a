"""Picked models are trained for longer, on Ray Tune."""
