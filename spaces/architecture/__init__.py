"""The space `architecture`: KV groups and FFN channels that each block keeps."""
