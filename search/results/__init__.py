"""Results of a run: front, pick, hypervolume, trials by target."""
