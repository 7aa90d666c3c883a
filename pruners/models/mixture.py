"""Mixture of experts of a block: its router, its routed experts, and a live one that is cut to some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruners.models.experts import Experts

TOP_K = "top_k"
GROUPS = ("num_group", "n_group")
LIMITS = ("topk_group",)
"""Routers' names of the groups of experts, and of the number of groups that a token may use."""

PROBE_TOKENS = 17
"""A prime: numbers of experts that groups do not divide fail."""


@dataclass(frozen=True)
class PerExpert:
    """Parameter or buffer with an entry an expert.

    Args:
        module: that owns it.
        name: of it there.
        axis: of the experts.
    """

    module: nn.Module
    name: str
    axis: int

    @property
    def owned(self) -> Tensor:
        """The parameter or buffer itself."""
        found: Tensor = getattr(self.module, self.name)
        return found

    @property
    def tensor(self) -> Tensor:
        return self.owned.data

    def point_to(self, tensor: Tensor) -> None:
        """Use this tensor from now on, by reference."""
        self.owned.data = tensor


@dataclass(frozen=True)
class Mixture:
    """Router and routed experts of a block.

    Args:
        name: full path of the module that holds both, e.g. ``model.layers.3.mlp``.
        module: that module.
        experts: the routed experts.
        entries: weight of the router first, then its bias, correction bias and the like.
        counts: attributes of live modules that give the number of experts.
        top_k: experts that a token is routed to.
        n_groups: groups of neighbouring experts that routing is limited to some of; 1: no limit.
        fewest: least number of experts that the router works with.
    """

    name: str
    module: nn.Module
    experts: Experts
    entries: tuple[PerExpert, ...]
    counts: tuple[tuple[nn.Module, str], ...]
    top_k: int
    n_groups: int = 1
    fewest: int = 1

    @property
    def n_experts(self) -> int:
        return len(self.experts)

    @property
    def n_channels(self) -> int:
        """Channels of each routed expert that is whole."""
        n_channels: int = self.experts.n_channels
        return n_channels

    @property
    def router(self) -> Float[Tensor, "experts width"]:
        """Weight of the router."""
        return self.entries[0].tensor

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert, with its entries in the router."""
        of_router = sum(x.tensor.numel() for x in self.entries if isinstance(x.owned, nn.Parameter))
        return sum(p.numel() for p in self.experts[0].parameters()) + of_router // self.n_experts

    def groups_of(self, kept: Sequence[int]) -> list[int]:
        """Number of these experts in each group."""
        size = self.n_experts // self.n_groups
        return [sum(index // size == group for index in kept) for group in range(self.n_groups)]

    def best(self, order: Sequence[int], n_kept: int) -> tuple[int, ...]:
        """The first experts of an order, ascending by number; as many of each group."""
        size = self.n_experts // self.n_groups
        chosen = [
            [index for index in order if index // size == group][: n_kept // self.n_groups]
            for group in range(self.n_groups)
        ]
        return tuple(sorted(index for group in chosen for index in group))

    def numbers(self, n_kept: int) -> Iterator[tuple[nn.Module, str, int]]:
        """Attributes of live modules with the values that they have if so many experts stay."""
        for module, name in self.counts:
            yield module, name, n_kept
        for module in {id(module): module for module in _owners(self.module)}.values():
            if isinstance(getattr(module, TOP_K, None), int):
                yield module, TOP_K, min(self.top_k, _reachable(self, module, n_kept))

    def check(self, n_kept: int) -> None:
        """Raise a ValueError unless so many experts can stay."""
        if not (n_kept == 0 or (self.fewest <= n_kept <= self.n_experts and n_kept % self.n_groups == 0)):
            groups = f", a multiple of its {self.n_groups} groups" if self.n_groups > 1 else ""
            raise ValueError(
                f"Expected 0 or {self.fewest} to {self.n_experts} experts{groups}, got {n_kept} [at {self.name}]."
            )


class LiveMixture:
    """Mixture of a live model, whole when this object is made."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._dense = [(entry, entry.tensor) for entry in mixture.entries]
        self._weights = [(p, p.data) for p in mixture.experts.parameters()]

    def cut(self, kept: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> None:
        """Route to these experts alone from now on; nothing is copied but the rows of the router.

        Args:
            kept: ascending numbers; as many of each group.
            weights: of parameters that change, by their names among the experts, e.g. ``3.up_proj.weight``.
        """
        self.restore()
        mixture, index = self._mixture, torch.tensor(kept, device=self._mixture.router.device)
        for entry, dense in self._dense:
            entry.point_to(dense.index_select(entry.axis, index))
        mixture.experts.kept = tuple(kept)
        for module, name, value in mixture.numbers(len(kept)):
            setattr(module, name, value)
        parameters = dict(mixture.experts.named_parameters())
        for name, weight in (weights or {}).items():
            parameters[name].data = weight

    def restore(self) -> None:
        """Make it whole again: the same tensors in the same parameters."""
        mixture = self._mixture
        for entry, dense in self._dense:
            entry.point_to(dense)
        for parameter, dense in self._weights:
            parameter.data = dense
        mixture.experts.kept = range(mixture.n_experts)
        for module, name, value in mixture.numbers(mixture.n_experts):
            setattr(module, name, value)


def find_mixture(owner: nn.Module, name: str) -> Mixture:
    """The mixture that a module of a live model holds; its experts are split, see `split_experts`.

    The router is the one matrix beside the experts with a row an expert; everything that it has an entry an expert of
    is cut with it. Whether it can be cut is tried on random tokens. The model is not changed.

    Raises:
        ValueError: if there is no such matrix, or more than one, or if the mixture does not work with fewer experts.
    """
    path, experts = next((path, x) for path, x in owner.named_modules() if isinstance(x, Experts))
    holder = owner.get_submodule(path.rpartition(".")[0])
    whole = f"{name}.{path.rpartition('.')[0]}".rstrip(".")
    entries = sorted(_entries(holder, len(experts)), key=lambda entry: -entry.tensor.ndim)
    first: Any = experts[0]
    width = first.down_proj.weight.shape[0]
    routers = [entry for entry in entries if entry.tensor.shape == (len(experts), width)]
    top_k = next((k for module in _owners(holder) if (k := getattr(module, TOP_K, None))), None)
    if len(routers) != 1 or top_k is None:
        raise ValueError(
            f"Expected a router with one row for each of the {len(experts)} experts and a number of experts for a "
            f"token (`{TOP_K}`), got {len(routers)} such matrices and {top_k} [at {whole}]. This mixture can't be "
            "pruned."
        )
    entries.sort(key=lambda entry: entry is not routers[0])
    counts = tuple(
        (module, key)
        for module in _owners(holder)
        for key, value in vars(module).items()
        if "expert" in key and type(value) is int and value == len(experts)
    )
    mixture = Mixture(whole, holder, experts, tuple(entries), counts, top_k)
    return _probed(mixture)


def _probed(mixture: Mixture) -> Mixture:
    """The mixture with its groups and the fewest experts with which it works."""
    groups = next(
        (n for module in _owners(mixture.module) for key in GROUPS if (n := getattr(module, key, None))), 1
    )
    for n_groups in sorted({1, groups}):
        sizes = range(n_groups, mixture.n_experts, n_groups)
        found = Mixture(**{**vars(mixture), "n_groups": n_groups})
        works = [n for n in (*sizes[: mixture.top_k + 1], *sizes[-1:]) if _works(found, n)]
        if works and works[-1] == sizes[-1]:
            return Mixture(**{**vars(found), "fewest": works[0]})
    raise ValueError(
        f"Expected a router that works with fewer experts, got {type(mixture.module).__name__}, which doesn't [at "
        f"{mixture.name}]. This mixture can't be cut."
    )


@torch.no_grad()
def _works(mixture: Mixture, n_kept: int) -> bool:
    """True if the mixture gives finite numbers for random tokens when it is cut to so many experts."""
    live, router = LiveMixture(mixture), mixture.router
    noise = torch.randn(1, PROBE_TOKENS, router.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        live.cut(mixture.best(range(mixture.n_experts), n_kept))
        output = mixture.module(noise.to(router))
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return bool(torch.isfinite(first).all())
    except (RuntimeError, IndexError, ValueError):  # the router counts otherwise
        return False
    finally:
        live.restore()


def _reachable(mixture: Mixture, router: Any, n_kept: int) -> int:
    """Experts that a token can be routed to."""
    limit = next((n for key in LIMITS if (n := getattr(router, key, None))), mixture.n_groups)
    return n_kept * min(limit, mixture.n_groups) // mixture.n_groups


def _entries(holder: nn.Module, n_experts: int) -> Iterator[PerExpert]:
    for module in _owners(holder):
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in own.items():
            axes = [axis for axis, size in enumerate(tensor.shape) if size == n_experts]
            if axes:
                yield PerExpert(module, name, axes[0])


def _owners(holder: nn.Module) -> Iterator[nn.Module]:
    """The module itself, its router and what belongs to it: all but routed and shared experts."""
    yield holder
    for path, child in holder.named_children():
        if not isinstance(child, Experts) and "shared" not in path:
            yield from child.modules()
