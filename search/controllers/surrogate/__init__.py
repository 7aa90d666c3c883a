"""Search by a model of the loss that learns from all measurements."""
