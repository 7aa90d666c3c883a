"""Memory of trainings: of a search's and a recovery's model, and of recipes, from their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.evaluators.forecast.prospect import Outline
from secateur.evaluators.training.methods import N_LAST
from secateur.evaluators.training.settings import RANKED, Method, Training
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.trainings import SCHEDULE
from secateur.spaces.forecast import Holding, Phase

CHANGED: Mapping[Method, int] = {"spp": 3, "scale_lora": 1, "perp": 2, "slope": 2}
"""Tensors of a projection's size that a backward pass keeps of its changed weight: it, its factors and its mask."""


def of_training(found: Outline, training: Training, window: int, phases: Sequence[Phase]) -> list[Holding]:
    """A model in training: float32 weights of its own, gradients, the optimizer's moments, activations of a batch."""
    anatomy = found.anatomy
    n_all = sum(x.numel() for x in anatomy.model.parameters())
    n_learning = _n_learning(anatomy, training)
    size = TrainingSize(
        1,
        training.batch,
        window,
        CHANGED.get(training.method, 0) * sum(x.n_weights for x in anatomy.linears),
        teacher=training.loss == "kl",
        n_blocks=len(anatomy.blocks) if training.loss == "reconstruct" else None,
    )
    held = tuple(phases)
    work, rows = size.work_bytes(anatomy) + 4 * size.n_values, size.batch * size.length
    return [
        Holding("weights in training", "device", 4 * n_all, held, "a copy in float32"),
        Holding(
            "gradients and optimizer",
            "device",
            12 * n_learning,
            held,
            f"{n_learning:,} values learn, by {training.method}",
            "--method",
        ),
        Holding("activations in training", "device", work, held, f"{rows:,} tokens a step", "batch"),
    ]


def _n_learning(anatomy: Anatomy, training: Training) -> int:
    """Number of trained values."""
    sizes = [sum(x.numel() for x in block.module.parameters()) for block in anatomy.blocks]
    if training.method in ("full", "slope"):
        return sum(x.numel() for x in anatomy.model.parameters())
    if training.method == "last":
        return sum(sizes[-N_LAST:]) + anatomy.head.weight.numel()
    if training.method == "merged":  # at most: every third block is dropped, its two neighbours are trained
        return sum(sorted(sizes)[-math.ceil(2 * len(sizes) / 3) :])
    if training.method in RANKED:
        of_rank = sum(x.in_features + x.out_features for x in anatomy.linears)
        of_rank += anatomy.vocab_size + anatomy.width if training.method == "perp" else 0
        return training.rank * of_rank
    norms = [name for block in anatomy.blocks for name in block.norms] + [anatomy.final_norm]
    modules = [anatomy.model.get_submodule(name) for name in norms if name]
    return sum(x.numel() for module in modules for x in module.parameters())


def of_trainings(
    found: Outline, sizes: Mapping[str, TrainingSize], kinds: Sequence[Any], phases: Sequence[Phase]
) -> list[Holding]:
    """The largest of a pruning's trainings, which follow each other; those of kinds of gradients are with these.

    Args:
        sizes: of the trainings by name.
        kinds: of gradients.
    """
    held = {name: size.n_bytes(found.anatomy) for name, size in sizes.items() if name not in kinds}
    if not held:
        return []
    name = max(held, key=held.__getitem__)
    size = sizes[name]
    why = f"{size.batch} windows a step, {size.n_values:,} values, gradients and moments, in fp32"
    why += ", a teacher" if size.teacher else ""
    if name == SCHEDULE:
        return [Holding("training", "device", held[name], tuple(phases), why, "schedule")]
    return [Holding(f"training of {name}", "device", held[name], tuple(phases), why, "calibration.length")]


def of_teacher(found: Outline, phases: Sequence[Phase]) -> list[Holding]:
    """The dense model beside the one in training."""
    n_bytes = sum(x.nbytes for x in found.anatomy.model.parameters())
    return [Holding("teacher", "device", n_bytes, tuple(phases), "a copy of the dense model", "stream")]
