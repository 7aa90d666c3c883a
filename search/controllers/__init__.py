"""Controllers: propose candidates and learn from their measurements."""
