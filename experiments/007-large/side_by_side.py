"""Blocks of several candidates computed side by side, against one after another.

    python side_by_side.py                 # all shapes, appended to side_by_side.jsonl, and the table
    python side_by_side.py --shapes tiny   # some of them
    python side_by_side.py --table         # the table alone, from side_by_side.jsonl

Candidates of one space have the same shapes of weights until something is cut. Side by side each projection is one
batched product over the stacked weights of all candidates, and everything else sees their windows as one batch. The
weights are at hand in both ways: a search would write its products of weight and mask into the stack.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.runner import BlockRunner

RESULTS = Path(__file__).parent / "side_by_side.jsonl"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
CANDIDATES, TOKENS, WINDOW = (2, 4, 8, 16), (64, 256, 2048), 256


@torch.no_grad()
def compared(
    anatomy: Anatomy, n_candidates: int, n_tokens: int, window: int, rounds: int, wait: Callable[[], None]
) -> dict[str, float]:
    """Time of the first block of all candidates in both ways, on states of their own, as after a block that differs.

    Args:
        rounds: measured by turns; the first is left out.
        wait: until the device is done.

    Returns:
        Median ms of both ways, the median over the rounds of their ratio, above 1 where side by side is faster, and
        the largest difference of the outputs, relative to the largest output.
    """
    block, runner = anatomy.blocks[0], BlockRunner(anatomy)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(anatomy.vocab_size, (max(1, n_tokens // window), window), generator=generator)
    inputs = runner.start(tokens)
    states = torch.cat([inputs.hidden * (1 + index / 16) for index in range(n_candidates)])
    dense = {x.name: x.weight for x in block.linears}
    stacked = {x.name: _pruned(x.weight, n_candidates) for x in block.linears}

    def in_turn() -> Tensor:
        found = []
        for index, own in enumerate(states.chunk(n_candidates)):
            for linear in block.linears:
                linear.point_to(stacked[linear.name][index])
            found.append(runner.block(block.index, own, inputs))
        return torch.cat(found)

    def side_by_side() -> Tensor:
        with _batched(block, stacked):
            return runner.block(block.index, states, inputs)

    try:
        outputs = in_turn(), side_by_side()
        times = [[_seconds(way, wait) for way in (in_turn, side_by_side)] for _ in range(rounds + 1)][1:]
    finally:
        for linear in block.linears:
            linear.point_to(dense[linear.name])
    off = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    return {
        "in turn, ms": 1e3 * median(x for x, _ in times),
        "side by side, ms": 1e3 * median(x for _, x in times),
        "ratio": median(x / y for x, y in times),
        "largest relative difference": float(off),
    }


def _pruned(weight: Tensor, n_candidates: int) -> Tensor:
    """Weights of the candidates, half of each zeroed at random."""
    made = weight.new_empty(n_candidates, *weight.shape)
    for one in made:
        torch.mul(weight, torch.rand_like(weight, dtype=torch.float32) < 0.5, out=one)
    return made


@contextmanager
def _batched(block: Block, stacked: Mapping[str, Tensor]) -> Iterator[None]:
    """Projections of a block give the products of each candidate's part of the batch with its own weights."""

    def forward_of(weights: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(len(weights), -1, x.shape[-1])
            return torch.bmm(rows, weights.transpose(1, 2)).reshape(*x.shape[:-1], -1)

        return forward

    modules = [linear.module for linear in block.linears]
    for linear in block.linears:
        linear.module.forward = forward_of(stacked[linear.name])
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _seconds(way: Callable[[], Tensor], wait: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    way()
    wait()
    return time.perf_counter() - began


def model_of(shapes: Mapping[str, int]) -> Anatomy:
    """A model of one block of these shapes with random weights, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(**shapes, vocab_size=512, num_hidden_layers=1)
    return dissect(LlamaForCausalLM(config).eval().requires_grad_(False))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Ratios as Markdown, a line a shape and number of tokens."""
    head = " | ".join(f"{n} candidates" for n in CANDIDATES)
    lines = [
        f"| shapes | tokens | {head} | largest difference |",
        f"|---|---:|{'---:|' * len(CANDIDATES)}---:|",
    ]
    for shapes, n_tokens in dict.fromkeys((row["shapes"], row["tokens"]) for row in rows):
        of = [row for row in rows if (row["shapes"], row["tokens"]) == (shapes, n_tokens)]
        found = {row["candidates"]: row for row in of}
        ratios = " | ".join(f"{found[n]['ratio']:.2f}" if n in found else "–" for n in CANDIDATES)
        worst = max(float(str(row["largest relative difference"])) for row in of)
        lines.append(f"| {shapes} | {n_tokens} | {ratios} | {worst:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="print the table alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in () if given.table else given.shapes:
        anatomy = model_of(SHAPES[name])
        for n_tokens in TOKENS:
            for n in CANDIDATES:
                found = compared(anatomy, n, n_tokens, min(WINDOW, n_tokens), given.rounds, lambda: None)
                row = {"shapes": name, "tokens": n_tokens, "candidates": n, **found}
                row |= {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]))


if __name__ == "__main__":
    main()
