"""Ranks the methods of recovery at equal trained tokens, and writes results.jsonl and the tables of README.md.

    python run.py [--parts weights structure blocks] [--seeds 3]

Each line of results.jsonl is one arm and seed: KL to the dense model in nats a token, and cross-entropy, on the test
text, which nothing else saw. Lines that are there are not measured again; `--tables` writes the tables alone.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from secateur.evaluators.data.text import load_parts, load_sources
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.depth.merge_targets import blocks_beside_dropped
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.search.app.pruning import pruner_on
from secateur.search.app.pruning_file import checked
from secateur.search.app.recipe_file import RecipeFile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from arms import command, measure  # noqa: E402  # in the folder above

TOKENS, POOL, WINDOW, BATCH, TESTED = 16384, 65536, 256, 1, 16384
UNTRAINED = "untrained"
OF_ALL = ("full", "norms", "lora", "spp", "scale_lora", "perp", "slope", "last")
ARMS: dict[str, dict[str, Any]] = {name: {"method": name} for name in (*OF_ALL, "merged")}
ARMS |= {
    "full, ce": {"method": "full", "loss": "ce"},
    "lora, ce": {"method": "lora", "loss": "ce"},
    "perp, reconstruct": {"method": "perp", "loss": "reconstruct"},
    "full, reconstruct": {"method": "full", "loss": "reconstruct"},
}
WITHOUT_MERGED = (UNTRAINED, *(name for name in ARMS if name != "merged"))
ARMS |= {
    "last, rate 3e-4": {"method": "last", "lr": 3e-4},
    "perp, rate 2e-3": {"method": "perp", "lr": 2e-3},
    "merged, rate 1e-3": {"method": "merged", "lr": 1e-3},
}
PARTS = {
    "weights": {
        "heading": "weights, 50 %, Wanda",
        "form": {"unit": "weights", "sparsity": 0.5, "metric": "wanda"},
        "arms": (*WITHOUT_MERGED, "last, rate 3e-4", "perp, rate 2e-3"),
    },
    "structure": {
        "heading": "structure, 30 %, FLAP",
        "form": {
            "unit": "structure",
            "sparsity": 0.3,
            "metric": "flap",
            "allocation": "flap",
            "repair": "bias",
        },
        "arms": WITHOUT_MERGED,
    },
    "blocks": {
        "heading": "blocks, two of six, merged by LaCo",
        "form": {"unit": "blocks", "sparsity": 0.3, "metric": "laco", "repair": "laco"},
        "arms": (
            UNTRAINED,
            "merged",
            "last",
            "lora",
            "norms",
            "full",
            "last, rate 3e-4",
            "merged, rate 1e-3",
        ),
    },
}


@cache
def dense():
    """The dense model, its losses' side of the test text, and the windows to train on."""
    loaded = load_model("tiny", dtype="float32", device="cpu")
    anatomy, texts = dissect(loaded.model), load_parts("docs", "docs", "docs")
    tested = teacher_batches(anatomy, windows(loaded.tokenizer, texts["test"], WINDOW, TESTED))
    return anatomy, tested, windows(loaded.tokenizer, texts["calibration"], WINDOW, 2 * TOKENS)


def measured(part: str, arm: str, seed: int) -> dict:
    """KL and cross-entropy on the test text, and the seconds that training took."""
    torch.set_num_threads(1)
    teacher, tested, trained_on = dense()
    loaded = load_model("tiny", dtype="float32", device="cpu")
    anatomy = dissect(loaded.model)
    raw = {
        "recipe": PARTS[part]["form"],
        "sources": {"calibration": "docs"},
        "pool_tokens": POOL,
        "seed": seed,
    }
    file = checked(RecipeFile, raw)
    sources = load_sources({"calibration": ""}, "docs", "docs", "docs")
    pruner = pruner_on(file, loaded, anatomy, sources, WINDOW, torch.zeros(0, 1, dtype=torch.int64))
    config = pruner.fitted(file.form)
    pruner.prune(config, sequential=False)
    found = {"sparsity": pruner.costs_of(config)["sparsity"] if part != "weights" else config["sparsity"]}
    started = time.monotonic()
    if arm != UNTRAINED:
        training = Training(**ARMS[arm], tokens=TOKENS, batch=BATCH, seed=seed)
        beside = blocks_beside_dropped(anatomy, merged=pruner.merges(config))
        trainer = Trainer(anatomy, training, trained_on, teacher, beside_dropped=beside)
        found["learning"] = trainer.n_learning
        trainer.train(trainer.n_steps)
        assert trainer.failure is None, trainer.failure
        trainer.finish()
    seconds = round(time.monotonic() - started, 1)
    losses = losses_on(anatomy, tested)
    trained = 0 if arm == UNTRAINED else TOKENS
    return {"kl": losses["kl"], "ce": losses["ce"], **found, "trained_tokens": trained, "seconds": seconds}


def main() -> None:
    args = command(__doc__, PARTS).parse_args()
    headings = {name: f"{part['heading']}, {TOKENS:,} trained tokens" for name, part in PARTS.items()}
    measure(HERE, args, {name: part["arms"] for name, part in PARTS.items()}, measured, headings)


if __name__ == "__main__":
    main()
