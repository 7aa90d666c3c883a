"""What causal LMs are made of, found by structure."""
