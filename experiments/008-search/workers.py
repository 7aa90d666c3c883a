"""Loss after a number of evaluations by the number of simulated workers, for all controllers.

    python workers.py RUN [--controllers evolution surrogate] [--workers 1 64 512 1024] [--evaluations 8192]
        [--seeds 0 1 2] [--results workers.jsonl]
    python workers.py --table workers.jsonl

The simulation is that of 002: real controller, loop, study and mirror, and simulated workers with two calls in flight.
RUN is a finished search of `tiny`, for its space and its evaluation times, which are made longer by one factor, so
that the smallest fidelity takes 6.2 s. The loss is that of `profile.json`, see `landscape.py`; each seed has another
one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from secateur.search.results.run import open_run
from secateur.search.show.values import spread
from secateur.spaces.measurement import Effects, Fidelity, Measurement

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "002-scale"))

from landscape import Profile  # noqa: E402  # beside this file
from simulate import Landscape, simulate  # noqa: E402  # in the folder above

CALL_S = 6.2
ALONE = {"levels": [0.6, 0.8]}  # slots measured alone at and above the target; other levels are interpolated
CONTROLLERS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "sensitivity": {"kind": "sensitivity", **ALONE},
    "evolution": {"kind": "evolution"},
    "evolution, 32 parents": {"kind": "evolution", "parents": 32},
    "evolution from sensitivity": {"kind": "evolution", "start": "sensitivity", "sensitivity": ALONE},
    "optuna cmaes": {"kind": "optuna", "sampler": "cmaes"},
    "optuna nsga2": {"kind": "optuna", "sampler": "nsga2"},
    "surrogate": {"kind": "surrogate"},
    "surrogate from sensitivity": {"kind": "surrogate", "prior": "sensitivity", "sensitivity": ALONE},
    "surrogate from curvature": {
        "kind": "surrogate",
        "prior": "sensitivity",
        "sensitivity": {"by": "curvature"},
    },
}
GRADIENT_COST = 5.6  # CPU time of a gradient over that of a loss on as many tokens, see `cost.py`


class RealLevels(Landscape):
    """The profile's loss, with evaluation times of a run."""

    def __init__(self, run, seed: int) -> None:
        super().__init__(run, np.random.default_rng(seed))
        self.profile = Profile(HERE / "profile.json", seed)
        smallest = run.settings.evaluator.search_fidelities[0].text
        factor = CALL_S / float(np.mean(self.seconds[smallest]))
        self.seconds = {fidelity: [factor * s for s in times] for fidelity, times in self.seconds.items()}
        alone = json.loads((HERE / "profile.json").read_text(encoding="utf-8"))["alone"]
        self.curvature = tuple(tuple(float(x) for x in row) for row in alone)

    def measure(self, text: str, fidelity: Fidelity) -> Measurement:
        if fidelity.part == "gradient":
            return self.dense_gradient(text, fidelity)
        return super().measure(text, fidelity)

    def dense_gradient(self, text: str, fidelity: Fidelity) -> Measurement:
        """Curvature of the dense model: the profile before the seed's perturbation, so 30 % off in each slot."""
        none = tuple((0.0,) * len(row) for row in self.curvature)
        seconds = GRADIENT_COST * float(self.rng.choice(self.seconds[f"search:{fidelity.n_tokens}"]))
        values = {"loss": 0.0, "kl": 0.0, **self.space.cost(self.space.parse(text))}
        return Measurement(
            text,
            fidelity,
            values,
            n_tokens=fidelity.total_tokens,
            seconds=seconds,
            worker="s",
            effects=Effects(none, self.curvature),
        )

    def exact(self, candidate) -> float:
        return self.profile.exact(candidate)

    def loss(self, candidate, fidelity) -> float:
        return self.profile.measured(candidate, fidelity.n_tokens)


def show(lines: list[dict[str, Any]], after: list[int]) -> None:
    """A table of the medians and ranges."""
    print("| controller | workers | " + " | ".join(f"{n:,}" for n in after) + " | driver ms a trial |")
    print("|---|---:|" + "---:|" * (len(after) + 1))
    for name, n_workers in dict.fromkeys((line["name"], line["workers"]) for line in lines):
        some = [line for line in lines if (line["name"], line["workers"]) == (name, n_workers)]
        cells = [
            spread([line["found_after"][str(n)] for line in some if str(n) in line["found_after"]])
            for n in after
        ]
        cells.append(spread([line["driver_ms_a_trial"] for line in some]))
        print(f"| {name} | {n_workers:,} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--controllers", nargs="+", default=list(CONTROLLERS), choices=CONTROLLERS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 64, 512, 1024])
    parser.add_argument("--evaluations", type=int, default=8192)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "workers.jsonl")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--after", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    args = parser.parse_args()
    if args.table is not None:
        show([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()], args.after)
        return
    run = open_run(args.run)
    for seed in args.seeds:
        for name in args.controllers:
            for n_workers in args.workers:
                landscape = RealLevels(run, seed)
                with tempfile.TemporaryDirectory() as scratch:
                    directory = Path(scratch) / "run"
                    line = simulate(
                        run, landscape, n_workers, args.evaluations, seed, directory, **CONTROLLERS[name]
                    )
                text = json.dumps({"name": name, **line})
                print(text, flush=True)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
