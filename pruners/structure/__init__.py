"""What a block is smaller without: KV groups with their query heads, FFN channels, whole sub-layers."""
