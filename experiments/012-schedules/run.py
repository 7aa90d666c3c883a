"""Compares pruning at once, with training afterwards, to rounds of pruning and training, at equal trained tokens.

    python run.py [--parts weights structure] [--seeds 3]

Each line of results.jsonl is one arm and seed: KL to the dense model in nats a token, and cross-entropy, on the test
text, which nothing else saw. Lines that are there are not measured again; `--tables` writes the table alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from secateur.evaluators.data.text import load_parts, load_sources
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.search.app.pruning import pruner_on
from secateur.search.app.pruning_file import checked
from secateur.search.app.recipe_file import RecipeFile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from arms import command, measure  # noqa: E402  beside the experiments

TOKENS, ROUNDS, WINDOW, TESTED = 32768, 8, 512, 16384
ROUND = TOKENS // ROUNDS
PARTS = {
    "weights": {
        "form": {
            "unit": "weights",
            "sparsity": 0.7,
            "metric": {"name": "magnitude", "comparison": "layer"},
        },
        "arms": {
            "at once, untrained": None,
            "at once, then trained": {"after": TOKENS},
            "8 linear rounds": {"steps": ROUNDS, "retrain": ROUND},
            "8 cubic rounds": {"steps": ROUNDS, "shape": "cubic", "retrain": ROUND},
        },
    },
    "structure": {
        "form": {"unit": "structure", "sparsity": 0.4, "metric": "wanda_sp"},
        "arms": {
            "at once, untrained": None,
            "at once, then trained": {"after": TOKENS},
            "8 linear rounds": {"steps": ROUNDS, "retrain": ROUND},
            "penalty, then at once": {"retrain": TOKENS, "penalty": 0.01},
            "half of each": {"retrain": TOKENS // 2, "penalty": 0.01, "after": TOKENS // 2},
        },
    },
}


def measured(part: str, arm: str, seed: int) -> dict:
    """KL and cross-entropy on the test text, and the seconds that pruning and training took."""
    torch.set_num_threads(1)
    loaded = load_model("tiny", dtype="float32", device="cpu")
    anatomy, text = dissect(loaded.model), load_parts("docs", "docs", "docs")["test"]
    tested = teacher_batches(anatomy, windows(loaded.tokenizer, text, WINDOW, TESTED))
    schedule = PARTS[part]["arms"][arm]
    form = PARTS[part]["form"] | ({} if schedule is None else {"schedule": schedule})
    file = checked(
        RecipeFile,
        {"recipe": form, "sources": {"calibration": "docs"}, "pool_tokens": 65536, "seed": seed},
    )
    sources = load_sources({"calibration": ""}, "docs", "docs", "docs")
    pruner = pruner_on(file, loaded, anatomy, sources, WINDOW, torch.zeros(0, 1, dtype=torch.int64))
    started = time.monotonic()
    config = pruner.fitted(file.form)
    pruner.prune(config, sequential=False)
    seconds = time.monotonic() - started
    losses = losses_on(anatomy, tested)
    sparsity = PARTS[part]["form"]["sparsity"]
    if part == "structure":
        sparsity = pruner.costs_of(config)["sparsity"]
    return {
        "kl": losses["kl"],
        "ce": losses["ce"],
        "sparsity": sparsity,
        "trained_tokens": 0 if schedule is None else TOKENS,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    args = command(__doc__, PARTS).parse_args()
    headings = {
        name: f"{name}, {part['form']['sparsity']:.0%}, {TOKENS:,} trained tokens"
        for name, part in PARTS.items()
    }
    measure(HERE, args, {name: part["arms"] for name, part in PARTS.items()}, measured, headings)


if __name__ == "__main__":
    main()
