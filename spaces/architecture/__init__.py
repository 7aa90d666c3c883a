"""The space `architecture`, in parts."""
