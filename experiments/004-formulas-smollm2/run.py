"""Searches for formulas with several seeds in turn; a run that is there is continued, so a stopped experiment goes on.

    python run.py RUNS --text FILE [--seeds 0 1 2] [--model DIR] [-o key.path=value ...]

All seeds share one store of statistics. Calibration, search and test are disjoint parts of the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent


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
        app.search_in_lines(settings, args.runs / name, levels=args.runs / "levels")


if __name__ == "__main__":
    main()
