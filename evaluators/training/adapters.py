"""Adapters that keep a weight's zeros: parametrizations of projections, merged at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.pruners.learned.low_rank import SCALE, first_right
from secateur.pruners.learned.training import named_generator
from secateur.pruners.models.anatomy import Linear


class Adapter(nn.Module):
    """Parametrization of a weight in its module's own layout.

    Args:
        linear: the projection.
        rank: of the update.
        generator: of the first values.
    """

    def __init__(self, linear: Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._transposed = linear.transposed
        self.left, self.right = (
            nn.Parameter(x.to(linear.weight.device))
            for x in self.first_values(linear.out_features, linear.in_features, rank, generator)
        )

    def first_values(
        self, n_out: int, n_in: int, rank: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """First values of the two factors, as in LoRA: their product, the update, is zero."""
        return torch.zeros(n_out, rank), first_right(rank, n_in, generator)

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight with the update; 0 where it is 0."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in the layout of the module."""
        return self.change(weight.T).T if self._transposed else self.change(weight)


class MaskedUpdate(Adapter):
    """MaskLoRA of PERP (Zimmer et al. 2023, arXiv 2312.15230): ``W + 2 mask (B A)``, the mask that of W's zeros."""

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + SCALE * (self.left @ self.right).masked_fill(weight == 0, 0)


class PlainUpdate(Adapter):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) of a weight that was not pruned: ``W + 2 B A``."""

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + SCALE * (self.left @ self.right)


class ScaledUpdate(Adapter):
    """ScaleLoRA of PERP (Zimmer et al. 2023, arXiv 2312.15230): ``W * (B A)``, at first 1 everywhere."""

    def first_values(
        self, n_out: int, n_in: int, rank: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        return torch.full((n_out, rank), rank**-0.5), torch.full((rank, n_in), rank**-0.5)

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight * (self.left @ self.right)


class SparsityPreserving(Adapter):
    """SPP (Lu et al. 2024, arXiv 2405.16057): ``W + 2 W * (alpha repeated over rows) * beta``.

    alpha has a row for each of `rank` runs of neighbouring rows of W, as many in each but for rounding, and begins as
    LoRA's A; beta has a number for each row, and begins as 0. The released code repeats evenly alone, and drops inputs
    out, which nothing here does.
    """

    def first_values(
        self, n_out: int, n_in: int, rank: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "out 1"], Float[Tensor, "rank in"]]:
        return torch.zeros(n_out, 1), first_right(min(rank, n_out), n_in, generator)

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        n_out, n_runs = len(weight), len(self.right)
        runs = torch.arange(n_out, device=weight.device) * n_runs // n_out
        return weight + SCALE * weight * self.right[runs] * self.left


def attach(linears: Iterable[Linear], adapter: type[Adapter], rank: int, seed: int) -> Callable[[], None]:
    """Give each projection an adapter, as trained parameters, with first values by the seed and its name.

    Returns:
        A function that writes the changed weights into the projections and takes the adapters away.
    """
    modules = []
    for linear in linears:
        generator = named_generator(seed, linear.name)
        parametrize.register_parametrization(linear.module, "weight", adapter(linear, rank, generator))
        modules.append(linear.module)

    def merge() -> None:
        with torch.no_grad():
            for module in modules:
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)

    return merge
