"""Blocks that batches of eight offspring of SmolLM2's size compute, by the cache's rule and by depth; no model is run.

python sharing.py [--generations 60]
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np

from secateur.evaluators.prefix_tree import walk
from secateur.pruners.stores.recent import Recent
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.shape import ModelShape, Unit

N_BLOCKS, WIDTH, N_TOKENS = 30, 576, 512
SIZES = {"q": 576 * 576, "k": 576 * 192, "v": 576 * 192, "o": 576 * 576}
SIZES |= dict.fromkeys(("gate", "up", "down"), 576 * 1536)
CACHE_BYTES = 1 << 26
N_OFFSPRING, SUCCESS = 8, 0.2


@dataclass(frozen=True)
class Output:
    """A block's output, by its size alone."""

    nbytes: int = N_TOKENS * WIDTH * 4


def computed(rule: str, late: float, n_generations: int) -> tuple[float, list[float]]:
    """Share of the blocks that are computed, and shares of the changes by thirds of the model."""
    n = len(SIZES)
    units = [
        Unit(f"{block}.{name}", (size,), block, (f"{block}.{name}",))
        for block in range(N_BLOCKS)
        for name, size in SIZES.items()
    ]
    levels, shape = tuple(i / 20 for i in range(19)), ModelShape(10**9, 2, 10**9, 10)
    space, rng = AllocationSpace(units, (), levels, (0.6,), shape), np.random.default_rng(0)
    parent, total, changes = space.baselines()["uniform@0.6"], 0, np.zeros(N_BLOCKS)
    recent = Recent[Output](0 if rule == "nothing" else CACHE_BYTES)
    for _ in range(n_generations):
        depth = rng.random() if rng.random() < late else 0.0
        children = [space.mutate_after(parent, depth, rng) for _ in range(N_OFFSPRING)]
        paths = [tuple(c.levels[n * b : n * b + n] for b in range(N_BLOCKS)) for c in children]
        sharing = Counter(path[: d + 1] for path in set(paths) for d in range(N_BLOCKS))

        def step(path: tuple[object, ...], member: int, state: Output, sharing: Counter = sharing) -> Output:
            def make() -> Output:
                nonlocal total
                total += 1
                return Output()

            return recent.get(path, make, first_to_go=rule == "shared" and sharing[path] == 1)

        list(walk(paths, Output(), step))
        for child in children:
            changed = np.not_equal(child.levels, parent.levels).reshape(N_BLOCKS, n)
            changes += changed.sum(1)
        if rng.random() < SUCCESS:
            parent = children[rng.integers(N_OFFSPRING)]
    thirds = changes.reshape(3, -1).sum(1) / changes.sum()
    return total / (n_generations * N_OFFSPRING * N_BLOCKS), [round(float(x), 2) for x in thirds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=60)
    args = parser.parse_args()
    for late in (0.0, 0.5, 1.0):
        shares = {rule: computed(rule, late, args.generations) for rule in ("nothing", "all", "shared")}
        texts = [f"{rule} kept {share:.1%}" for rule, (share, _) in shares.items()]
        print(
            f"late {late}: {', '.join(texts)}; changes by thirds of the model {shares['shared'][1]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
