"""Searches for formulas with several seeds in turn; a run that is there is continued, so a stopped experiment goes on.

    python run.py RUNS --text FILE [--seeds 0 1 2] [--model DIR] [-o key.path=value ...]

All seeds share one store of statistics. Calibration, search and test are disjoint parts of the text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from secateur.search import app
from secateur.search.controller import Trial
from secateur.search.loop import Outcome
from secateur.search.settings import Budget, load_settings
from secateur.search.study import Spent

HERE = Path(__file__).parent


class Log:
    """A line for each round in which something was measured on data."""

    def __init__(self, name: str) -> None:
        self._name, self._best, self._started = name, float("inf"), time.process_time()
        self._screened = 0

    def on_start(self, n_known: int, budget: Budget) -> None:
        print(f"{self._name}: {n_known} measurements known, budget {budget}", flush=True)

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        found = [trial.measurement for trial in trials]
        screened = sum(m.fidelity.part == "proxy" for m in found)
        self._screened += screened
        losses = [m.values["loss"] for m in found if m.fidelity.n_tokens == 2048 and m.values]
        self._best = min([self._best, *(loss for loss in losses if loss > 0.01)])  # the dense model has less
        if screened < len(found):
            cpu = time.process_time() - self._started
            print(
                f"{self._name}: {spent.evaluations} evaluations, {self._screened} screened, best {self._best:.4f}, "
                f"{cpu:.0f} CPU s",
                flush=True,
            )

    def on_end(self, outcome: Outcome) -> None:
        print(f"{self._name}: {outcome}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    args.runs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        settings = load_settings(HERE / "config.yaml", [*common, *args.override, f"seed={seed}"])
        name = f"seed-{seed}"
        say = lambda line, name=name: print(f"{name}: {line}", flush=True)  # noqa: E731  # as short as it gets
        app.search(settings, args.runs / name, observers=[Log(name)], say=say, levels=args.runs / "levels")


if __name__ == "__main__":
    main()
