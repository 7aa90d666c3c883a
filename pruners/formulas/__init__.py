"""Formulas as importance metrics: trees computed on the tensors of a layer."""
