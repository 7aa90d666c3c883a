"""Executors: who runs evaluations, and where."""
