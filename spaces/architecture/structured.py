"""Base class of the free and the tied space of architectures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Self

import numpy as np

from secateur.spaces.architecture.candidate import Architecture
from secateur.spaces.architecture.cost import cost
from secateur.spaces.architecture.forms import FormTargets
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.architecture.slot_targets import SlotTargets
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.space import Space

REPAIR_MOVES = 0.1  # share of mutations that change the repair alone, if there are several


class StructuredSpace(Space[Architecture]):
    """Architectures of one model, with baselines.

    Args:
        shape: of the dense model, with its blocks.
        repairs: compensations for removed weights.
    """

    def __init__(self, shape: ModelShape, repairs: Sequence[str], counted: FormTargets | SlotTargets) -> None:
        self._shape = shape
        self.repairs = tuple(repairs)
        self._targets, self.levels = counted.targets, counted.levels
        self._further: dict[str, Architecture] = {}

    @property
    def targets(self) -> tuple[float, ...]:
        return self._targets

    @property
    @abstractmethod
    def dense(self) -> Architecture:
        """The dense model."""

    @abstractmethod
    def uniform(self, target: int) -> Architecture:
        """Reference of a target."""

    @abstractmethod
    def from_scores(self, kind: str, scores: Scores, target: int) -> Architecture | None:
        """Architecture of a published allocation; None if it has none that meets the target."""

    def baselines(self) -> dict[str, Architecture]:
        named = {"dense": self.dense}
        for target in range(len(self.targets)):
            named[self.named("uniform", target)] = self.uniform(target)
        return named | self._further

    def scored_baselines(self, kinds: Sequence[str], scores: Scores) -> dict[str, Architecture]:
        """Architectures of published allocations for each target, such as ``flap@0.25``, without duplicates."""
        found: dict[str, Architecture] = {}
        known = set(self.with_baselines({}).baselines().values())
        for kind in kinds:
            for target in range(len(self.targets)):
                candidate = self.from_scores(kind, scores, target)
                if candidate is not None and candidate not in known:
                    known.add(candidate)
                    found[self.named(kind, target)] = candidate
        return found

    def with_baselines(self, named: Mapping[str, Architecture]) -> Self:
        """The same space with these baselines after the uniform ones."""
        other = copy(self)
        other._further = dict(named)
        return other

    def cost(self, candidate: Architecture) -> Mapping[str, float]:
        repair = candidate.repair or self.repairs[0]
        return cost(self._shape, candidate.blocks, repair, candidate.hidden)

    def config(self, candidate: Architecture) -> Mapping[str, Any]:
        """``{"blocks": [{"kv_groups": 3, "ffn": 1536}, ...], "repair": "none"}``, see `Kept.plain`.

        And ``"hidden": 512`` where hidden channels are cut.
        """
        blocks = [kept.plain for kept in candidate.blocks]
        plain = {"blocks": blocks, "repair": candidate.repair or self.repairs[0]}
        return plain | ({"hidden": candidate.hidden} if candidate.hidden else {})

    def portable(self, candidate: Architecture, linears: Sequence[Prunable]) -> Mapping[str, Any]:
        """``{"blocks": [{"kv_groups": "2/3", "ffn": "1024/1536"}, ...], "repair": ...}``: kept of all units."""
        blocks = [
            {
                "kv_groups": f"{kept.kv_groups}/{dense.n_kv_groups or 1}",
                "ffn": f"{kept.ffn}/{dense.ffn_width or 1}",
            }
            | ({"queries": f"{kept.queries}/{dense.n_queries}"} if kept.queries else {})
            | (
                {"channels": f"{kept.channels}/{dense.experts.channels}"}
                if kept.channels and dense.experts
                else {}
            )
            | ({"shared": f"{kept.shared}/{dense.experts.shared}"} if kept.shared and dense.experts else {})
            for kept, dense in zip(candidate.blocks, self._shape.blocks, strict=True)
        ]
        if candidate.hidden:
            raise ValueError(
                f"Expected an architecture with all hidden channels to carry to other models, got {candidate.hidden}."
            )
        return {"blocks": blocks, "repair": candidate.repair or self.repairs[0]}

    def parse(self, text: str) -> Architecture:
        candidate = Architecture.parse(text)
        known = self.repairs if len(self.repairs) > 1 else ("",)
        if candidate.repair not in known:
            raise ValueError(f"Expected `repair` out of {known}, got {candidate.repair!r}.")
        if len(candidate.blocks) != len(self._shape.blocks):
            raise ValueError(f"Expected {len(self._shape.blocks)} blocks, got {len(candidate.blocks)}.")
        self._check_blocks(candidate)
        return candidate

    @abstractmethod
    def _check_blocks(self, candidate: Architecture) -> None:
        """Raise a ValueError unless the blocks are of this space; their number is correct."""

    # --- the repair as a gene ---

    def _repair_of(self, candidate: Architecture) -> int:
        return self.repairs.index(candidate.repair) if candidate.repair else 0

    def _repair_name(self, repair: int) -> str:
        """Name of the repair in a candidate."""
        return self.repairs[repair] if len(self.repairs) > 1 else ""

    def _other_repair(self, repair: int, rng: np.random.Generator) -> int | None:
        """Another repair in a few mutations, else None."""
        n = len(self.repairs)
        moves = n > 1 and rng.random() < REPAIR_MOVES
        return (repair + int(rng.integers(1, n))) % n if moves else None
