"""How recipes are carried out: from a plain form to weights, by reference or for good."""
