"""Test loss of each run's best candidate as it was searched, and pruned once more sequentially, as exports may be.

    python exported.py RUN...

Results are kept in the run, so that a run that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from secateur.search import app
from secateur.search.app.found import best_of

COLUMNS = ("search KL", "test KL", "perplexity", "sequentially: test KL", "perplexity")


def exported(run: Path) -> list[float]:
    """Values of the columns for the best candidate of a run that ended."""
    kept = run / "measured.json"
    if kept.exists():
        found: list[float] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    last = app.open_run(app.last_stage(run))
    best = best_of(last)
    test = last.test_of(best)
    assert test is not None
    session = app.open_session(last.settings)
    data = session.data()
    data.of(session.plan.final_fidelities[-1])  # the dense side, while the model is dense
    session.pruner.prune(session.config(best.measurement.candidate), sequential=True)
    behind = data.live_losses(session.plan.final_fidelities[-1])
    values = [best.measurement.values["kl"], test.values["kl"], math.exp(test.values["ce"])]
    values += [behind["kl"], math.exp(behind["ce"])]
    kept.write_text(json.dumps(values), encoding="utf-8")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    print(f"| run | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}", sep="\n")
    for run in parser.parse_args().runs:
        print(f"| {run.name} | {' | '.join(f'{x:.4g}' for x in exported(run))} |", flush=True)


if __name__ == "__main__":
    main()
