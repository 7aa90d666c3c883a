"""The study: measurements on disk, and what they belong to."""
