"""Formulas as importance metrics: trees, operators, grammar, simplification, variation. No torch."""
