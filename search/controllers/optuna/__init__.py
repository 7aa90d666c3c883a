"""Controllers over Optuna's samplers."""
