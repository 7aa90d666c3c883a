"""Memory of long windows: statistics, an evaluated candidate and its loss at a small width, each in a fresh process.

    python long.py [--lengths 8192 32768] [--out long.jsonl]

Memory is what the peak of the resident set grows by during the work, in MB, beside the bytes of one boolean square of
the window, which a mask would take, and of one float square, which the scores of one head would take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.evaluators.losses import Teacher, loss_sums
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.memory import forget_peak, resident_bytes
from secateur.pruners.models.runner import BlockRunner

VOCABULARY = 32_000


def measure(length: int) -> dict[str, float]:
    """Work on one window of random tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
    )
    anatomy = dissect(LlamaForCausalLM(config).eval().requires_grad_(False))
    tokens = torch.randint(VOCABULARY, (1, length))
    forget_peak()
    before, began = resident_bytes(), time.perf_counter()
    with torch.no_grad():
        runner = BlockRunner(anatomy)
        inputs = runner.start(tokens)
        teacher = Teacher(anatomy, lambda: runner.run(inputs), keep=False)
        loss_sums(anatomy, runner.run(inputs), tokens, teacher)
        for _ in stream_blocks(anatomy, tokens, inputs="gram"):
            pass
    return {
        "length": length,
        "grown_mb": round((resident_bytes("VmHWM") - before) / 1e6, 1),
        "mask_mb": length**2 / 1e6,
        "scores_mb": 4 * length**2 / 1e6,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help="measure this length in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    for length in args.lengths:
        command = [sys.executable, __file__, "--one", str(length)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(line, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
