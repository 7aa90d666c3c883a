"""Forecasts: what a command will hold and how long it takes, from the config alone."""
