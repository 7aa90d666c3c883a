"""Export of pruned models: formats, checks, manifest and model card."""
