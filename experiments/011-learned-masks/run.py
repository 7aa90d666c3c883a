"""Compares learned masks with the default searches at equal computed tokens, and writes results.jsonl and README.md.

    python run.py [--parts weights structure pattern] [--seeds 3] [--work DIR]

A backward pass counts as two forward passes. Each line of results.jsonl is one arm and seed: KL to the dense model in
nats a token, and cross-entropy, on the test text, which nothing else saw. Lines that are there are not measured again,
and what a killed run has in `--work` is continued; `--tables` writes the table alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import settings_from

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from arms import command, measure  # noqa: E402  beside the experiments

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


def main() -> None:
    parser = command(__doc__, PARTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "learned-masks")
    args = parser.parse_args()

    def timed(name: str, arm: str, seed: int) -> dict:
        part, directory, start = (
            PARTS[name],
            args.work / f"{name}-{arm.split(maxsplit=1)[0]}-{seed}",
            time.monotonic(),
        )
        if arm == "default search":
            found = searched(part, seed, directory)
        else:
            found = (recipe if name != "pattern" else pattern)(part, arm, seed, directory)
        return found | {"seconds": round(time.monotonic() - start, 1)}

    arms = {name: (*part["plain"], part["learned"], "default search") for name, part in PARTS.items()}
    headings = {
        name: f"{name}, {part['sparsity']:.0%}, {part['tokens']:,} tokens" for name, part in PARTS.items()
    }
    measure(HERE, args, arms, timed, headings)


if __name__ == "__main__":
    main()
