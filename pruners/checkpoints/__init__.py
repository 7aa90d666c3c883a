"""Where models come from: directories, the hub, GGUF files, and the cache of converted ones."""
