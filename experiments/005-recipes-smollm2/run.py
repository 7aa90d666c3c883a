"""Runs the arms of the comparison; a run that is there is continued, so a stopped experiment goes on.

    python run.py RUNS --text FILE [--units structure weights] [--arms ...] [--seeds 0 1 2] [--model DIR] [-o k=v ...]

`joint` is AdaPruner's search over calibration data and metric, and allocation and repair with them; then each part
alone; `random` draws what `joint` searches. Every arm begins with the best published recipe, and has what it does not
search from there. All arms of a unit share pools and statistics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
TARGETS = {"structure": 0.2, "weights": 0.5}
PARTS = ("calibration", "metric", "allocation", "repair")
START = {"structure": "cfsp", "weights": "admm"}
"""Best of `../methods/earlier.md`: every arm measures it first, and it gives what an arm does not search."""
REPAIRS = {"structure": "[none, bias, refit, obs]", "weights": "[none, bias, obs, admm]"}
"""Without ADMM of structure, whose steps converge to `obs` at many times its cost."""
ARMS = {
    "joint": [],
    "random": ["controller={kind: random}"],
    **{part: [f"space.search=[{part}]"] for part in PARTS},
}


def shared(unit: str, text: str, model: str | None) -> list[str]:
    """What a unit's runs have in common, as overrides of `config.yaml`."""
    found = [f"evaluator.data.{part}={text}" for part in ("calibration", "search", "test")]
    # Two sources of calibration text: that of the search, and another one.
    found += [f"space.sources={{search: '{text}', docs: docs}}"] if text != "docs" else []
    found += [f"model={model}"] if model else []
    found += [f"space.repairs={REPAIRS[unit]}"]
    return [*found, f"space.unit={unit}", f"space.target={TARGETS[unit]}", f"space.start={START[unit]}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights, or another model")
    parser.add_argument("--units", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for unit in args.units:
        for arm in args.arms:
            for seed in args.seeds:
                name = f"{unit}-{arm}-{seed}"
                overrides = [*shared(unit, args.text, args.model), *ARMS[arm], f"seed={seed}", *args.override]
                settings = load_settings(HERE / "config.yaml", overrides)
                app.search_in_lines(settings, args.runs / name, levels=args.runs / f"levels-{unit}")


if __name__ == "__main__":
    main()
