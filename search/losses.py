"""Losses that a search can minimise: names, definitions, units, papers."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.spaces.measurement import MARGIN


@dataclass(frozen=True)
class Loss:
    """Loss: the value that becomes ``loss`` in measurements, >= 0 and smaller is better.

    Args:
        summary: definition in words.
        unit: of the loss; empty where it has none.
        paper: address of the paper, if it comes from one.
    """

    summary: str
    unit: str
    paper: str = ""


# By the name in `evaluator.loss`.
LOSSES: dict[str, Loss] = {
    "kl": Loss("KL divergence to the dense model", "nats/token"),
    "ce": Loss("cross-entropy of the next token", "nats/token"),
    "weighted_kl": Loss(
        "KL divergence to the dense model over the fifth of each window's tokens that a reference damages most",
        "nats/token",
    ),
    "acceptance": Loss(
        "share of tokens that speculative decoding rejects, 1 - expected acceptance",
        "",
        "https://arxiv.org/abs/2603.06003",
    ),
}


def loss_of(name: str) -> Loss:
    """Loss of this name: a row of `LOSSES`, or that of a task's margins, ``margin:<task>``."""
    if not name.startswith(MARGIN):
        return LOSSES[name]
    return Loss(f"log(1 + exp(-margin)) of the right answers in {name.removeprefix(MARGIN)}", "nats/sample")
