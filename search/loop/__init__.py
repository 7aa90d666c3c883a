"""The search loop: ask, measure, remember, tell."""
