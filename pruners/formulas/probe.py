"""Probe layers: a few small ones on which formulas are compared before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.formulas.terminals import Terminals


def probe_of(terminals: Mapping[str, Float[Tensor, "_ _"]], rows: int = 16) -> Terminals:
    """Probe of a layer: the terminals of some rows, evenly spread over the layer, in fp64.

    Rounding then ties fewer weights than in fp32, so that ``log(x)`` ranks like ``x``. R, C and the like are those of
    the whole layer; minmax, zscore and rank see the chosen rows alone.
    """
    return {name: x.double().cpu() for name, x in some_rows(terminals, rows).items()}


def chosen_rows(n_out: int, rows: int) -> Int[Tensor, " chosen"]:
    """Indices of so many rows of a layer, or of all that it has, evenly spread."""
    return torch.linspace(0, n_out - 1, min(rows, n_out)).round().long()


def some_rows(terminals: Mapping[str, Float[Tensor, "_ _"]], rows: int) -> Terminals:
    """Terminals of so many rows, evenly spread over the layer; those that belong to no row are unchanged."""
    n_out = len(terminals["W"])
    chosen = chosen_rows(n_out, rows)
    return {name: x[chosen.to(x.device)] if x.shape[0] == n_out > 1 else x for name, x in terminals.items()}


def gaussian_probes(
    seed: int = 0, shapes: Sequence[tuple[int, int]] = ((16, 96), (16, 192), (16, 128))
) -> tuple[Terminals, ...]:
    """Probes without a model: Gaussian weights and gradients, inputs and rows of uneven size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def one(index: int, n_out: int, n_in: int) -> Terminals:
        inputs, rows = normal(1, n_in).exp(), (normal(n_out, 1) / 2).exp()
        weight = 0.05 * normal(n_out, n_in) * rows / inputs.sqrt()
        return {
            "W": weight,
            "G": 1e-3 * (normal(n_out, n_in) * inputs * (normal(n_out, 1) / 2).exp()).abs(),
            "X": inputs,
            "H": (normal(1, n_in) / 3).exp() / inputs.square(),
            "R": weight.abs().sum(1, keepdim=True),
            "C": weight.abs().sum(0, keepdim=True),
            "P": torch.full((1, 1), index / max(len(shapes) - 1, 1), dtype=torch.float64),
        }

    return tuple(one(i, *shape) for i, shape in enumerate(shapes))
