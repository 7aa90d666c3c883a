"""Experiment trackers, such as TensorBoard or MLflow, that a search reports to."""
