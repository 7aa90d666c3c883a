"""How good a candidate is: fidelities, losses, cost and latency, light training, tasks."""
