"""The board of methods: its settings, its cells, and the rows of its tables."""
