"""Light training of a pruned model that keeps its zeros: to recover models, and as part of a fidelity."""
