"""Writes a Llama of a size at which weights outweigh an interpreter: random weights, another model's tokenizer.

    python wide.py MODEL DIR [--hidden 2048] [--layers 22]

For measurements of memory alone: `run.py SCRATCH --model DIR --metric magnitude`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 512),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.directory, max_shard_size="100GB")
    tokenizer.save_pretrained(args.directory)
    print(f"{sum(p.nbytes for p in model.parameters()) / (1 << 20):,.0f} MB")


if __name__ == "__main__":
    main()
