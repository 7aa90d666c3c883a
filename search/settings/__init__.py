"""Settings files, read strictly."""
