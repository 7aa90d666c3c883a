"""Methods of training by the parameters that they train: a registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from secateur.evaluators.training.adapters import (
    MaskedUpdate,
    PlainUpdate,
    ScaledUpdate,
    SparsityPreserving,
    attach,
)
from secateur.evaluators.training.settings import Method, Training
from secateur.evaluators.training.slope import attach_lazily
from secateur.pruners.models.anatomy import Anatomy, Linear

N_LAST = 3
"""Blocks at the end that `last` trains."""


@dataclass(frozen=True)
class Learner:
    """Steps of a training method that the trainer runs for it.

    Args:
        merge: writes what was trained into the model's own weights.
        before_step: called before each step with its number and that of all steps.
    """

    merge: Callable[[], object] = lambda: None
    before_step: Callable[[int, int], None] = lambda step, n_steps: None


def _all(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    anatomy.model.requires_grad_(True)
    return Learner()


def _norms(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    for parameter in _of_norms(anatomy):
        parameter.requires_grad_(True)
    return Learner()


def _lora(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    from secateur.evaluators.training.lora import attach_lora  # PEFT is an extra

    return Learner(attach_lora(anatomy, training.rank, training.seed).merge_and_unload)


def _spp(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    return Learner(attach(_projections(anatomy), SparsityPreserving, training.rank, training.seed))


def _scale_lora(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    return Learner(attach(_projections(anatomy), ScaledUpdate, training.rank, training.seed))


def _perp(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    """PERP's whole set (Zimmer et al. 2023, arXiv 2312.15230): biases, norms, MaskLoRA, and LoRA of the head.

    A head that shares its weight with the embedding is left out: its update would move the embedding, too.
    """
    for name, parameter in anatomy.model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    for parameter in _of_norms(anatomy):
        parameter.requires_grad_(True)
    merges = [attach(_projections(anatomy), MaskedUpdate, training.rank, training.seed)]
    if anatomy.head.weight is not anatomy.embedding.weight:
        head = Linear("the head", anatomy.head, "o", "mlp", len(anatomy.blocks), transposed=False)
        merges.append(attach([head], PlainUpdate, training.rank, training.seed))
    return Learner(lambda: [merge() for merge in merges])


def _slope(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    anatomy.model.requires_grad_(True)
    return Learner(*attach_lazily(_projections(anatomy), training.rank, training.seed))


def _last(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    """The last three blocks, the final norm and the head (Reassessing Layer Pruning, arXiv 2411.15558)."""
    blocks = [block.module for block in anatomy.blocks if any(x.n_weights for x in block.linears)][-N_LAST:]
    modules = [*blocks, *map(anatomy.model.get_submodule, filter(None, [anatomy.final_norm])), anatomy.head]
    for module in modules:
        module.requires_grad_(True)
    return Learner()


def _merged(anatomy: Anatomy, training: Training, beside_dropped: Sequence[int]) -> Learner:
    """The blocks beside dropped ones alone, see `blocks_beside_dropped`: healing after depth pruning.

    Of LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), which trains nothing but the layer that stands for several;
    there by the squared error of its outputs, as the repair ``streamline`` does, here by the loss of the whole model.
    The healing of Gromov et al. (2024, arXiv 2403.17887) is ``lora``, of all blocks.

    Raises:
        ValueError: if no block was dropped.
    """
    if not beside_dropped:
        raise ValueError(
            "Expected a model without some of its blocks for the method merged, got one with all of them. Choose "
            "another method."
        )
    for index in beside_dropped:
        anatomy.blocks[index].module.requires_grad_(True)
    return Learner()


def _projections(anatomy: Anatomy) -> Iterator[Linear]:
    return (linear for linear in anatomy.linears if linear.n_weights)  # the others were removed


def _of_norms(anatomy: Anatomy) -> Iterator[nn.Parameter]:
    names = [name for block in anatomy.blocks for name in block.norms]
    for name in filter(None, [*names, anatomy.final_norm]):
        yield from anatomy.model.get_submodule(name).parameters()


METHODS: Mapping[Method, Callable[[Anatomy, Training, Sequence[int]], Learner]] = MappingProxyType(
    {
        "full": _all,
        "norms": _norms,
        "lora": _lora,
        "spp": _spp,
        "scale_lora": _scale_lora,
        "perp": _perp,
        "slope": _slope,
        "last": _last,
        "merged": _merged,
    }
)
"""Functions that make the parameters of a method trainable; the last argument: blocks beside dropped ones."""
