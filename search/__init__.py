"""Who proposes, who runs, what is remembered: controllers, executors, study, front."""
