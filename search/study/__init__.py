"""Study: measurements on disk, their description, and the log of asks."""
