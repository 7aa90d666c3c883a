"""A copy of the study for Optuna's tools."""
