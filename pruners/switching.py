"""How a candidate turns into weights: for each block a key, and how to switch the block to it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.weights.level_store import LevelStore
from secateur.spaces.space import Space


class InfeasibleError(ValueError):
    """A candidate that can't become weights; its text is the reason."""


@runtime_checkable
class Switcher(Protocol):
    """Turns a plain configuration into switches of single blocks."""

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """One key a block; two candidates with equal keys have equal weights in that block.

        Raises:
            InfeasibleError: if the candidate can't become weights.
        """
        ...

    def apply(self, block: int, key: Hashable) -> None:
        """Make the live block what the key says, by reference."""
        ...

    def restore(self) -> None:
        """Make the whole model dense again."""
        ...


@runtime_checkable
class Copies(Protocol):
    """A switcher whose changed blocks take memory of their own, beside the dense ones."""

    def release(self, block: int) -> None:
        """Make one block dense again: it was computed. Nobody else has its weights: their memory may serve others."""
        ...


@runtime_checkable
class Counts(Protocol):
    """A switcher that counts what a configuration costs, where that depends on what it finds in the weights."""

    def cost(self, config: Mapping[str, Any]) -> Mapping[str, float] | None:
        """Exact counts by name; None: those of the space are exact.

        Raises:
            InfeasibleError: if the candidate can't become weights.
        """
        ...


def cost_of(space: Space[Any], switcher: Switcher, candidate: Any) -> Mapping[str, float]:
    """What a candidate costs: as its switcher counts, or else as its space does."""
    found = switcher.cost(space.config(candidate)) if isinstance(switcher, Counts) else None
    return space.cost(candidate) if found is None else found


class LevelSwitcher:
    """Switches projections to levels of a store.

    Args:
        anatomy: the live model.
        store: its level store.
        levels: sparsities of the store, ascending from 0.0.
    """

    def __init__(self, anatomy: Anatomy, store: LevelStore, levels: Sequence[float]) -> None:
        self._anatomy = anatomy
        self._store = store
        self._index = {sparsity: level for level, sparsity in enumerate(levels)}
        self._dense = tuple((0,) * len(block.linears) for block in anatomy.blocks)
        self._now = list(self._dense)

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """Tuples of levels, one level a projection."""
        sparsity = config["sparsity"]
        return [
            tuple(self._index[sparsity[linear.name]] for linear in block.linears)
            for block in self._anatomy.blocks
        ]

    def apply(self, block: int, key: Hashable) -> None:
        """Point the projections whose level changes to the weights of their new level."""
        assert isinstance(key, tuple)
        before = self._now[block]
        for linear, old, new in zip(self._anatomy.blocks[block].linears, before, key, strict=True):
            if old != new:
                linear.point_to(self._store.weight(linear, new))
        self._now[block] = key

    def release(self, block: int) -> None:
        """See `Copies.release`."""
        for linear, level in zip(self._anatomy.blocks[block].linears, self._now[block], strict=True):
            if level:
                self._store.take_back(linear, level)
        self._now[block] = self._dense[block]

    def restore(self) -> None:
        """All projections back to level 0."""
        for block, key in enumerate(self._dense):
            self.apply(block, key)
