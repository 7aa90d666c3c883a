"""Learned masks: relaxations with gradients, their training, and the published systems as settings of it."""
