"""Search: controllers, executors, the study and its front."""
