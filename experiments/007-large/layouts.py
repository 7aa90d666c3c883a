"""Products with a weight whose columns lie in one run, against one whose rows do, on one thread of this CPU.

    python layouts.py [--tokens 64] [--rounds 3]

The weight is a down projection of Llama-3.2-1B. Rounds are interleaved; ratios of one round each, as median and range.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.functional import linear

from secateur.evaluators.session import set_threads
from secateur.search.show.values import spread

N_OUT, N_IN = 2048, 8192


def seconds(states: torch.Tensor, weight: torch.Tensor) -> float:
    """CPU time of a product."""
    started = time.process_time()
    linear(states, weight)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    set_threads(1)
    print("| dtype | columns over rows | this dtype over float32, rows |")
    print("|---|---:|---:|")
    plain: list[float] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        states = torch.randn(1, args.tokens, N_IN, dtype=dtype)
        rows = torch.randn(N_OUT, N_IN, dtype=dtype)
        columns = rows.T.contiguous().T
        linear(states, rows)
        found = [(seconds(states, columns), seconds(states, rows)) for _ in range(args.rounds)]
        plain = plain or [by_rows for _, by_rows in found]
        layouts = spread([x / y for x, y in found])
        dtypes = spread([y / z for (_, y), z in zip(found, plain, strict=True)])
        print(f"| {str(dtype).removeprefix('torch.')} | {layouts} | {dtypes} |", flush=True)


if __name__ == "__main__":
    main()
