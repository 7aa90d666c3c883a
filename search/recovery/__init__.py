"""Recovery: longer training of picked models, on Ray Tune."""
