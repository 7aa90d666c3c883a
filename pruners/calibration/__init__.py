"""Calibration: statistics of the dense model, gradients, and the choice of windows."""
