"""Measurement of candidates: data, fidelities, losses, cost and latency, light training, tasks."""
