"""Recipes: everything a person sets by hand when pruning, as one space."""
