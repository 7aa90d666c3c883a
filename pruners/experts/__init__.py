"""Importances of the routed experts of a mixture, and merging of those that go into those that stay."""
