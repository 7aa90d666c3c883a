"""Salience of units by activations, their gradients and outliers, noted while a model is tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Seen(NamedTuple):
    """Inputs of an output projection in a step, over its tokens, by column.

    Args:
        sizes: sums of the absolute values.
        slopes: sums of the absolute values of the loss's gradients.
        means: means of the values.
    """

    sizes: Float[Tensor, " columns"]
    slopes: Float[Tensor, " columns"]
    means: Float[Tensor, " columns"]


def watched(outputs: Callable[[Tensor], Tensor], note: Callable[[Seen], None]) -> Callable[[Tensor], Tensor]:
    """The same function of a projection's inputs, that calls `note` in each backward pass through these."""

    def watching(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()  # nothing before it is tuned
        flat = x.detach().flatten(0, -2)
        sizes, means = flat.abs().sum(0), flat.mean(0)
        x.register_hook(lambda slope: note(Seen(sizes, slope.flatten(0, -2).abs().sum(0), means)))
        return outputs(x)

    return watching


def salience(seen: Seen, weight: Float[Tensor, "out columns"], n_units: int) -> Float[Tensor, " units"]:
    """Outlier-aware salience of the units in whose columns an output projection's inputs are.

    APT (Zhao et al. 2024, arXiv 2401.12200), equations 4 and 5: ``sum |H| sum |dL/dH|`` of each column, each sum over
    the tokens, added up over the unit's columns; plus the square root of the excess kurtosis of the products of mean
    inputs and weights in these columns, as in the released code, 0 where it is below a normal distribution's.

    Args:
        seen: of the inputs.
        weight: of the projection, merged.
        n_units: number of units, whose columns follow each other.
    """
    products = (seen.sizes * seen.slopes).reshape(n_units, -1).sum(1)
    return products + kurtosis((weight * seen.means).T.reshape(n_units, -1)).clamp(min=0).sqrt()


def kurtosis(values: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Excess kurtosis of each row, by the unbiased variance; -3 where all values are equal."""
    centred = values - values.mean(1, keepdim=True)
    return (centred / values.std(1, keepdim=True)).nan_to_num(0.0).pow(4).mean(1) - 3
