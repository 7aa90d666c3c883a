"""Saves structured models, which are really smaller, in forms that others load."""
