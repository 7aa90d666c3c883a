"""Formulas as importance metrics: programs (plain data) computed on the tensors of a layer."""
