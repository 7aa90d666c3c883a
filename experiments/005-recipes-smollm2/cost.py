"""What a trial costs that changes the metric alone, beside the first one with its calibration data.

    python cost.py SCRATCH --text FILE [--units structure weights] [--model DIR] [--evaluations 7]
                   [--start RECIPE]

Searches over AdaPruner's metrics, which need gradients, with statistics that nobody has collected before, one candidate
a call. Seconds are those of the measurements: deciding what goes, statistics where they are missing, and the loss on
the search part.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from run import ARMS, HERE, TARGETS, shared

from secateur.search import app
from secateur.search.results.run import open_run
from secateur.search.settings.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model")
    parser.add_argument("--units", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--evaluations", type=int, default=7)
    parser.add_argument("--start", help="gives the repair; by default that of the arms")
    args = parser.parse_args()
    for unit in args.units:
        directory = args.scratch / f"cost-{unit}"
        shutil.rmtree(directory, ignore_errors=True)
        changes = [
            *shared(unit, args.text, args.model),
            *ARMS["metric"],
            "space.metrics=[blend]",
            "controller={kind: random}",
        ]
        changes += [f"budget.evaluations={args.evaluations}"]
        changes += [f"space.start={args.start}"] if args.start else []
        app.search_in_lines(load_settings(HERE / "config.yaml", changes), directory)
        run = open_run(directory)
        given = {trial.measurement.candidate for trial in run.baselines.values()}
        for trial in run.trials():
            m = trial.measurement
            if m.candidate not in given:
                print(f"{m.seconds:.1f} s: {m.candidate}")
        first, *rest = [t.measurement.seconds for t in run.trials() if t.measurement.candidate not in given]
        again = statistics.median(rest)
        print(
            f"{unit}: first {first:.1f} s, then {again:.1f} s (median of {len(rest)}), {first / again:.1f} times"
        )


if __name__ == "__main__":
    main()
