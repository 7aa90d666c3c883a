"""What controllers find on bowls with a known optimum: `python samplers.py [--seeds 10]`.

Slots of three sizes, one target; the loss is a weighted sum of squared distances to a hidden candidate of the target.
Printed is the best loss of each controller after as many measurements at one fidelity, median and range over
seeds.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import numpy as np

from secateur.search.controller import Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit

SHAPE = ModelShape(n_params=10**6, bytes_per_param=2, macs_per_token=10**6, kv_bytes_per_token=10)
FIDELITY = Fidelity("search", 2048)
SIZES = ((6, 60), (21, 200))  # slots, measurements
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {}),
    ("evolution", {}),
    ("optuna", {"sampler": "tpe"}),
    ("optuna", {"sampler": "cmaes"}),
    ("optuna", {"sampler": "nsga2"}),
    ("optuna", {"sampler": "random"}),
)


def best_of(kind: str, options: dict[str, Any], n_slots: int, n: int, seed: int) -> float:
    """The lowest loss after `n` measurements."""
    units = [Unit(f"u{i}", (1000 * (1 + i % 3),), i, (f"u{i}",)) for i in range(n_slots)]
    space = AllocationSpace(units, (), [level / 20 for level in range(19)], (0.5,), SHAPE)
    rng = np.random.default_rng((seed, n_slots, 1))  # not as controllers seed theirs
    hidden = np.asarray(space.sample(rng, 0).levels)
    weights = rng.uniform(0.2, 1, n_slots)
    row = CONTROLLERS[kind]
    settings = row.settings(kind=kind, **options)
    extra = {"objectives": ("loss",)} if row.multi_objective else {}
    controller = row.build(space, (FIDELITY,), seed, settings, **extra)
    best, told = float("inf"), 0
    while told < n and (proposals := controller.ask(1)):
        for proposal in proposals:
            loss = float((weights * (np.asarray(proposal.candidate.levels) - hidden) ** 2).sum())
            values = {"loss": loss, **space.cost(proposal.candidate)}
            controller.tell([Trial(told, Measurement(proposal.candidate.text, FIDELITY, values))])
            best, told = min(best, loss), told + 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    n_seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")  # Optuna's, of experimental samplers
    print("| slots | measurements | controller | best loss | range |\n|---:|---:|---|---:|---:|")
    for n_slots, n in SIZES:
        for kind, options in ROWS:
            found = [best_of(kind, options, n_slots, n, seed) for seed in range(n_seeds)]
            name, middle = ", ".join([kind, *options.values()]), statistics.median(found)
            print(
                f"| {n_slots} | {n} | {name} | {middle:.3g} | {min(found):.3g} to {max(found):.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
