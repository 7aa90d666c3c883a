"""What light training makes of candidates at several rates of learning: KL on the search part.

    python rates.py RUNS --text FILE [--model DIR] [--rates 1e-5 3e-5 ...] [--tokens 512 2048 4096] [--run evolution-0]

The uniform candidate, and the best one of a run at its target; every parameter learns, one window a step, at a constant
rate, distilled from the dense model. A line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.training.settings import Training
from secateur.search.app.session import plan
from secateur.search.results.run import open_run
from secateur.search.settings.settings import load_settings
from secateur.spaces.measurement import Fidelity

HERE = Path(__file__).parent


def candidates(session: Session, run: Path | None) -> dict[str, str]:
    """The uniform candidate, and the best one that a run found at its target."""
    found = {"uniform": session.space.baselines()["uniform@0.25"].text}
    if run is not None:
        trials = [t for t in open_run(run).trials() if abs(t.measurement.values["sparsity"] - 0.25) < 0.02]
        best = min(trials, key=lambda trial: trial.measurement.values["loss"])
        found[run.name] = best.measurement.candidate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-5, 3e-5, 1e-4, 3e-4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--run", help="whose best candidate is trained, too")
    args = parser.parse_args()
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    set_threads(1)
    known = plan(load_settings(HERE / "config.yaml", changes))
    search, test = known.fidelities[-2:]
    fidelities = [Fidelity("search", search.n_tokens, n_trained) for n_trained in args.tokens]
    for rate in args.rates:
        recipe = Training(method="full", tokens=max(args.tokens), batch=1, lr=rate, schedule="constant")
        session = Session(replace(known, training=recipe, fidelities=(search, *fidelities, test)))
        levels = args.runs / "levels"
        session.build_levels(levels)
        evaluator = session.evaluator(levels)
        for name, candidate in candidates(session, args.runs / args.run if args.run else None).items():
            for fidelity in (search, *fidelities):
                [found] = evaluator.evaluate([candidate], fidelity)
                row = {"candidate": name, "rate": rate, "trained": fidelity.n_trained}
                print(json.dumps(row | {"kl": round(found.values["kl"], 4)}), flush=True)


if __name__ == "__main__":
    main()
