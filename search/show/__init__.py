"""Output for people: progress, tables, pictures, the report."""
