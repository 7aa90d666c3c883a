"""CPU time of an ask, by controller and number of trials told: `python asks.py`.

Trials are told with losses made up from the candidate; 60 slots, one target. Times are the mean of the last asks
of 8 before the number is reached, told one batch late, so that eight are under way.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit

SHAPE = ModelShape(n_params=10**6, bytes_per_param=2, macs_per_token=10**6, kv_bytes_per_token=10)
FIDELITY = Fidelity("search", 2048)
ROWS: list[tuple[str, dict[str, Any], tuple[str, ...], int]] = [
    ("random", {}, ("loss",), 10_000),
    ("evolution", {}, ("loss",), 10_000),
    ("surrogate", {}, ("loss",), 10_000),
    ("optuna", {"sampler": "random"}, ("loss",), 2000),
    ("optuna", {"sampler": "cmaes"}, ("loss",), 2000),
    ("optuna", {"sampler": "nsga2"}, ("loss", "sparsity"), 2000),
    ("optuna", {"sampler": "nsga3"}, ("loss", "sparsity"), 2000),
    ("optuna", {"sampler": "tpe"}, ("loss",), 2000),
    ("optuna", {"sampler": "tpe"}, ("loss", "sparsity"), 2000),
    ("optuna", {"sampler": "gp"}, ("loss",), 24),
]


def space_of(targets: tuple[float, ...]) -> AllocationSpace:
    units = [Unit(f"u{i}", (1000 * (1 + i % 3),), i, (f"u{i}",)) for i in range(60)]
    return AllocationSpace(units, (), [level / 20 for level in range(19)], targets, SHAPE)


def measure(space: AllocationSpace, number: int, proposal: Proposal) -> Trial:
    levels = proposal.candidate.levels
    loss = sum((level / 20) ** 2 / (1 + slot) for slot, level in enumerate(levels))
    values = {"loss": loss, **space.cost(proposal.candidate)}
    return Trial(number, Measurement(proposal.candidate.text, proposal.fidelity, values))


def fill(controller: Controller, space: AllocationSpace, n: int) -> float:
    """Ask for and tell `n` trials; CPU milliseconds a proposal of the last asks, at most 80 proposals."""
    asked, late, times = 0, [], []
    while asked < n:
        start = time.process_time()
        proposals = controller.ask(8)
        times.append((time.process_time() - start) / max(1, len(proposals)))
        asked += len(proposals)
        controller.tell([measure(space, asked, proposal) for proposal in late])
        late = proposals
    last = times[-min(10, len(times) // 4) :]
    return 1000 * sum(last) / len(last)


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)  # of gp
    print("| controller | objectives | trials | CPU ms an ask |\n|---|---|---:|---:|")
    for kind, settings, objectives, n in ROWS:
        row = CONTROLLERS[kind]
        space = space_of((0.5,) if len(objectives) == 1 else (0.4, 0.5, 0.6))
        more = {"objectives": objectives} if row.multi_objective else {}
        controller = row.build(space, (FIDELITY,), 0, row.settings(kind=kind, **settings), **more)
        name = " ".join([kind, *settings.values()])
        print(f"| {name} | {len(objectives)} | {n} | {fill(controller, space, n):.2f} |", flush=True)


if __name__ == "__main__":
    main()
