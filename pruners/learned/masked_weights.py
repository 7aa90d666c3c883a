"""Projections that compute with masked weights, while a mask is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from secateur.pruners.models.anatomy import Linear


@contextmanager
def replaced_forwards(
    linears: Sequence[Linear], outputs: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Context in which projections give other outputs.

    Args:
        linears: of the live model.
        outputs: by full name, a function of the projection's inputs.
    """
    patched = [linear for linear in linears if linear.name in outputs]
    try:
        for linear in patched:
            linear.module.forward = outputs[linear.name]
        yield
    finally:
        for linear in patched:
            linear.module.__dict__.pop("forward", None)


@contextmanager
def replaced_weights(
    linears: Sequence[Linear], weights: Mapping[str, Callable[[], Tensor]]
) -> Iterator[None]:
    """Context in which projections compute with other weights, through which gradients flow.

    Args:
        linears: of the live model.
        weights: by full name, a function that gives the ``out in`` weight; called in each forward pass.
    """

    def computing(linear: Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, weights[linear.name](), linear.bias)

    with replaced_forwards(linears, {x.name: computing(x) for x in linears if x.name in weights}):
        yield


@contextmanager
def masked_weights(linears: Sequence[Linear], masks: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Context in which projections compute with masked weights; `masks` as `weights` of `replaced_weights`."""

    def product(linear: Linear) -> Callable[[], Tensor]:
        return lambda: linear.weight * masks[linear.name]()

    with replaced_weights(linears, {x.name: product(x) for x in linears if x.name in masks}):
        yield
