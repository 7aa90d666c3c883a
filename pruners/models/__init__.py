"""Models: families, loading, layout of blocks, and running them block by block."""
