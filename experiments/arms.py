"""Arms of an experiment on several seeds: its command, lines that a kill does not lose, and the table of its README."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MARKS = "<!-- table -->", "<!-- end -->"

Line = dict[str, Any]


def command(description: str | None, parts: Iterable[str]) -> argparse.ArgumentParser:
    """Parser with the options of all these experiments: ``--parts``, ``--seeds`` and ``--tables``."""
    names = list(parts)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true")
    return parser


def measure(
    here: Path,
    args: argparse.Namespace,
    arms: Mapping[str, Iterable[str]],
    measured: Callable[[str, str, int], Line],
    headings: Mapping[str, str],
) -> None:
    """Measure the missing arms, seed by seed, into ``results.jsonl``, and write the tables of ``README.md``.

    Args:
        here: directory of the experiment.
        args: as `command` reads them.
        arms: of each part.
        measured: ``kl`` and ``ce``, and more, of a part, an arm and a seed.
        headings: of the table of each part.
    """
    path, readme = here / "results.jsonl", here / "README.md"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    done = {(x["part"], x["arm"], x["seed"]) for x in lines}
    for seed in range(0 if args.tables else args.seeds):
        for part in args.parts:
            for arm in arms[part]:
                if (part, arm, seed) in done:
                    continue
                lines.append({"part": part, "arm": arm, "seed": seed, **measured(part, arm, seed)})
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    text, tables = readme.read_text("utf-8"), table(lines, headings)
    before, after = text[: text.index(MARKS[0])], text[text.index(MARKS[1]) :]
    readme.write_text("\n".join([before + MARKS[0], "", *tables, after]), encoding="utf-8")
    print("\n".join(tables))


def table(lines: Iterable[Line], headings: Mapping[str, str]) -> list[str]:
    """Arms of each part, the lowest mean KL first, with its range over the seeds and their number."""
    found: list[str] = []
    for part, heading in headings.items():
        of_arms: dict[str, list[Line]] = {}
        for line in lines:
            if line["part"] == part:
                of_arms.setdefault(line["arm"], []).append(line)
        if not of_arms:
            continue
        rows = []
        for arm, same in of_arms.items():
            kl = [x["kl"] for x in same]
            mean, perplexity = statistics.mean(kl), math.exp(statistics.mean(x["ce"] for x in same))
            spread = f"{mean:.3f} ({min(kl):.3f} to {max(kl):.3f})"
            rows.append((mean, f"| {arm} | {spread} | {perplexity:.1f} | {len(same)} |"))
        found += [
            f"### {heading}",
            "",
            "| arm | KL, mean (range) | perplexity | seeds |",
            "|---|---:|---:|---:|",
        ]
        found += [*(row for _, row in sorted(rows)), ""]
    return found
