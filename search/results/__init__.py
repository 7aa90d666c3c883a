"""Results of a run: front, pick, hypervolume, course."""
