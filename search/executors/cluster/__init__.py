"""The executor `ray`: workers are Ray actors on this machine or on a cluster."""
