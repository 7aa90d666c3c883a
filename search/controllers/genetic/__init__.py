"""The controller `genetic`, in parts."""
