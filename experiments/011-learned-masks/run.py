"""Compares learned masks with the default searches at equal computed tokens, and writes results.jsonl and README.md.

    python run.py [--parts weights structure pattern] [--seeds 3] [--work DIR]

A backward pass counts as two forward passes. Each line of results.jsonl is one arm and seed: KL to the dense model in
nats a token, and cross-entropy, on the test text, which nothing else saw. Lines that are there are not measured again,
and what a killed run has in `--work` is continued; `--tables` writes the table alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import settings_from

HERE = Path(__file__).parent
WINDOWS, LENGTH = 64, 256
EVALUATOR = {"window": 512, "calibration_tokens": WINDOWS * LENGTH, "test_tokens": 16384}
CALIBRATION = {"samples": [WINDOWS], "length": [LENGTH]}
ALL = WINDOWS * LENGTH

# Tokens that the methods compute with: of BESA in each block 8 passes of 3 and, once, inputs, targets and outputs; of
# Sheared LLaMA 200 steps of 4 windows; of MaskLLM 100 steps of 4 windows of 512, behind SparseGPT's pass.
PARTS = {
    "weights": {
        "sparsity": 0.6,
        "learned": "besa",
        "tokens": (8 * 3 + 3) * ALL,
        "plain": ("wanda",),
        "search": {"kind": "allocation", "metric": "wanda", "target": 0.6},
    },
    "structure": {
        "sparsity": 0.4,
        "learned": "sheared",
        "tokens": 200 * 4 * LENGTH * 3,
        "plain": ("flap", "wanda_sp"),
        "search": {"kind": "architecture", "target": 0.4},
    },
    "pattern": {
        "sparsity": 0.5,
        "learned": "maskllm",
        "tokens": 100 * 4 * 512 * 3 + ALL,
        "plain": ("wanda", "sparsegpt"),
        "search": {"kind": "allocation", "metric": "sparsegpt", "group_size": 4, "target": 0.5},
    },
}
MARKS = "<!-- table -->", "<!-- end -->"


def searched(part: dict, seed: int, directory: Path) -> dict:
    raw = {"space": part["search"], "budget": {"tokens": part["tokens"]}}
    found = measured(raw, seed, directory)
    dense, *others = [x for x in found if "values" in x]
    met = [x for x in others if abs(x["values"]["sparsity"] - part["sparsity"]) < 0.02]
    lines = [json.loads(x) for x in (directory / "measurements.jsonl").read_text("utf-8").splitlines()]
    losses = {
        x["candidate"]: x["values"]["loss"]
        for x in lines
        if x["fidelity"].startswith("search") and "values" in x
    }
    best = min(met, key=lambda x: losses[x["candidate"]])  # by the search text
    n_tokens = sum(x["tokens"] for x in lines if not x["fidelity"].startswith("test"))
    return values(best) | {"tokens": n_tokens, "dense_ce": dense["values"]["ce"]}


def pattern(part: dict, name: str, seed: int, directory: Path) -> dict:
    """2 of each 4 weights: the one candidate of the space with no more zeros in a group."""
    space = part["search"] | {"metric": name, "max_sparsity": part["sparsity"]}
    raw = {"space": space, "controller": {"kind": "random"}, "budget": {"evaluations": 1}}
    (line,) = [x for x in measured(raw, seed, directory) if "values" in x and x["values"]["sparsity"]]
    return values(line) | {"tokens": part["tokens"] if name == part["learned"] else ALL}


def recipe(part: dict, name: str, seed: int, directory: Path) -> dict:
    space = {"kind": "recipe", "unit": "weights" if part["learned"] == "besa" else "structure"}
    space |= {
        "target": part["sparsity"],
        "start": name,
        "known": [],
        "search": ["calibration"],
        **CALIBRATION,
    }
    found = measured(
        {"space": space, "controller": {"kind": "random"}, "budget": {"evaluations": 2}}, seed, directory
    )
    (line,) = [x for x in found if "values" in x and x["values"]["sparsity"]][:1]
    return values(line) | {"tokens": part["tokens"] if name == part["learned"] else 0}


def measured(raw: dict, seed: int, directory: Path) -> list[dict]:
    """Lines of the test text of a run, which is continued where it was killed."""
    settings = settings_from({"model": "tiny", "evaluator": EVALUATOR, "seed": seed, **raw})
    app.search(settings, directory)
    lines = (directory / "measurements.jsonl").read_text("utf-8").splitlines()
    return [x for x in map(json.loads, lines) if x["fidelity"].startswith("test")]


def values(line: dict) -> dict:
    return {name: line["values"][name] for name in ("kl", "ce", "sparsity")}


def table(lines: list[dict]) -> list[str]:
    found = []
    for name, part in PARTS.items():
        found += [
            f"### {name}, {part['sparsity']:.0%}, {part['tokens']:,} tokens",
            "",
            "| arm | KL, mean (range) | perplexity | seeds |",
            "|---|---:|---:|---:|",
        ]
        rows = []
        for arm in dict.fromkeys(x["arm"] for x in lines if x["part"] == name):
            same = [x for x in lines if (x["part"], x["arm"]) == (name, arm)]
            kl = [x["kl"] for x in same]
            mean, perplexity = statistics.mean(kl), math.exp(statistics.mean(x["ce"] for x in same))
            rows.append(
                (
                    mean,
                    f"| {arm} | {mean:.3f} ({min(kl):.3f} to {max(kl):.3f}) | {perplexity:.1f} | {len(same)} |",
                )
            )
        found += [*(row for _, row in sorted(rows)), ""]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "learned-masks")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    path = HERE / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    done = {(x["part"], x["arm"], x["seed"]) for x in lines}
    for seed in range(0 if args.tables else args.seeds):
        for name in args.parts:
            part = PARTS[name]
            for arm in (*part["plain"], part["learned"], "default search"):
                if (name, arm, seed) in done:
                    continue
                directory, start = args.work / f"{name}-{arm.split()[0]}-{seed}", time.monotonic()
                how = recipe if name != "pattern" else pattern
                found = (
                    searched(part, seed, directory)
                    if arm == "default search"
                    else how(part, arm, seed, directory)
                )
                found |= {"seconds": round(time.monotonic() - start, 1)}
                lines.append({"part": name, "arm": arm, "seed": seed, **found})
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    readme = HERE / "README.md"
    text, tables = readme.read_text("utf-8"), table(lines)
    before, after = text[: text.index(MARKS[0])], text[text.index(MARKS[1]) :]
    readme.write_text("\n".join([before + MARKS[0], "", *tables, after]), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
