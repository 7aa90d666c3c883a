"""Checkpoints: hub, directories, GGUF files and the embedded models."""
