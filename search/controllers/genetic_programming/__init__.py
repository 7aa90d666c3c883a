"""The controller `genetic`: genetic programming over formulas."""
