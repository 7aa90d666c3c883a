"""The space `masks`: which KV groups and FFN channels each block keeps."""
