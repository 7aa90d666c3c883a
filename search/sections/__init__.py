"""Sections of the settings, each with a model of its own."""
