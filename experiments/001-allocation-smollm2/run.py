"""Runs the arms of the comparison; a run that is there is continued, so a stopped experiment goes on.

    python run.py RUNS --text FILE [--arms uniform sensitivity evolution both] [--seeds 0 1 2] [--model DIR]
        [--set KEY=VALUE ...] [--suffix NAME]

All arms share one level store; `--set` changes settings of this call's arms, and `--suffix` names their runs. The
arm `both` starts from the measurements of `sensitivity`, which are the same for every seed: they count in its tokens,
and are not computed three times.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
EVOLUTION = ["controller.kind=evolution", "controller.offspring=8", "controller.survivors=[2]"]
LEVELS = "[0.6]"  # each linear is measured alone at the target; the other levels are interpolated
ARMS = {
    "uniform": ["controller.kind=uniform"],
    "sensitivity": ["controller.kind=sensitivity", f"controller.levels={LEVELS}"],
    "evolution": EVOLUTION,
    "both": [*EVOLUTION, "controller.start=sensitivity", f"controller.sensitivity.levels={LEVELS}"],
    "curvature": ["controller.kind=sensitivity", "controller.by=curvature"],
    "curvature-evolution": [
        *EVOLUTION,
        "controller.start=sensitivity",
        "controller.sensitivity.by=curvature",
    ],
    "surrogate": [
        "controller.kind=surrogate",
        "controller.prior=sensitivity",
        "controller.sensitivity.by=curvature",
        "controller.offspring=8",
        "controller.survivors=[2]",
    ],
    "trust_region": ["controller.kind=trust_region"],
    "trust_region-evolution": [*EVOLUTION, "controller.start=trust_region"],
}
ALWAYS = ["uniform", "sensitivity", "evolution", "both"]
SEEDED = {"evolution", "both", "curvature-evolution", "trust_region-evolution", "surrogate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--arms", nargs="+", default=ALWAYS, choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--set", nargs="+", default=[], dest="changes")
    parser.add_argument("--suffix", default="")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    common += [f"budget.tokens={args.tokens}"] if args.tokens else []
    common += args.changes
    for arm in args.arms:
        for seed in args.seeds if arm in SEEDED else [0]:
            name = f"{arm}{args.suffix}-{seed}"
            directory = args.runs / name
            if arm == "both" and not directory.exists():
                shutil.copytree(args.runs / "sensitivity-0", directory, symlinks=True)
            settings = load_settings(HERE / "config.yaml", [*common, *ARMS[arm], f"seed={seed}"])
            app.search_in_lines(settings, directory, levels=args.runs / "levels")


if __name__ == "__main__":
    main()
