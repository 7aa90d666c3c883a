"""Mirror of a study for Optuna's tools."""
