"""Executors: evaluations in this process, or on workers of a Ray cluster."""
