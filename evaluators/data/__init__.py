"""Texts, tokens and windows that candidates are calibrated and measured on."""
