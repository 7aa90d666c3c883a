"""A small task of lm-eval: its file, its documents, and scores of the answers by plain code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from secateur.pruners.models.loading import LoadedModel

TASK = (Path(__file__).parent.parent / "docs" / "tasks" / "piqa-local.yaml").read_text()
DOCS = [
    {"goal": f"what is {thing} for?", "sol1": right, "sol2": wrong, "label": i % 2}
    for i, (thing, right, wrong) in enumerate(
        [
            ("a list", "to hold several values in order", "to swim"),
            ("a loop", "to repeat statements", "purple"),
            ("an import", "to use another module", "the cat of the"),
            ("a class", "to make objects", "to to to to to to"),
            ("an exception", "to report an error", "7"),
            ("a function", "to call code by a name", "under a tree, perhaps"),
            ("a dictionary", "to map keys to values", "never"),
            ("a comment", "to explain the code", "to raise SystemExit twice"),
            ("yield", "to make a generator", "a kind of cheese"),
            ("pass", "to do nothing", "to do everything at once"),
        ]
    )
]


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "piqa-local.yaml").write_text(TASK)
    (path / "piqa.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return path


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    from secateur.pruners.models.loading import load_model

    return load_model("tiny")


def task_settings(directory: Path, **changes: object) -> dict[str, object]:
    """A small search that weighs the loss against the task's accuracy."""
    evaluator = {"window": 64, "calibration_tokens": 256, "fidelities": [64, 128], "test_tokens": 64}
    evaluator |= {"tasks": {"directory": str(directory), "samples": 6}}
    raw = {
        "space": {"metric": "wanda", "granularity": "sublayer", "target": [0.5, 0.9]},
        "controller": {"kind": "random"},
        "evaluator": evaluator,
        "objectives": ["loss", "task:piqa-local"],
        "budget": {"evaluations": 5},
    }
    return {**raw, **changes}


def plain_margins(tiny: LoadedModel, docs: Sequence[dict[str, Any]]) -> list[float]:
    """Log-likelihood of the right answer minus that of the wrong one."""
    import torch

    @torch.no_grad()
    def log_likelihood(question: str, answer: str) -> float:
        before = tiny.tokenizer(question).input_ids
        ids = torch.tensor([tiny.tokenizer(f"{question} {answer}").input_ids])
        log_p = tiny.model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1]))

    margins = []
    for doc in docs:
        question = f"Question: {doc['goal']}\nAnswer:"
        scores = [log_likelihood(question, doc[name]) for name in ("sol1", "sol2")]
        margins.append(scores[doc["label"]] - scores[1 - doc["label"]])
    return margins


def plain_accuracy(tiny: LoadedModel, docs: Sequence[dict[str, Any]]) -> float:
    """Share of documents whose right answer is the likelier one after the question."""
    return sum(margin > 0 for margin in plain_margins(tiny, docs)) / len(docs)
