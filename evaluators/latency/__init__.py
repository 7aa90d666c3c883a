"""Latency of models on a device: tables of sub-layers by size, and whole models in turns."""
