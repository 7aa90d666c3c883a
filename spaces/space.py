"""The extension point `Space`: candidates, their variation and exact cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np

from secateur.spaces.shape import Prunable


class Candidate(Protocol):
    """A small immutable value with one canonical text: its identity, cache key and stored form."""

    @property
    def text(self) -> str:
        """Canonical text; `Space.parse` is its inverse."""
        ...


C = TypeVar("C", bound=Candidate)


class Space(ABC, Generic[C]):
    """Candidates: sampling, mutation, crossover, repair, text form, and exact cost.

    Each space defines the quantity of its targets (sparsity, parameters, latency). Targets are named by their index,
    the mildest first.

    `shown_as` is the heading of candidates' texts in tables, or "" to omit them. `stand_ins` lists, by canonical text,
    costs with a placeholder value, which ranks the candidate but is not displayed.

    Methods do not modify their arguments; all random choices use the given generator.
    """

    shown_as: ClassVar[str] = ""
    stand_ins: ClassVar[Mapping[str, frozenset[str]]] = {}

    _asked: tuple[float, ...] = ()

    @property
    @abstractmethod
    def targets(self) -> tuple[float, ...]:
        """Targets of the search, ascending; a target is named by its index."""

    def asked_as(self, shares: Sequence[float]) -> Self:
        """The same space, whose baselines are named after these shares, e.g. of the whole model, one a target."""
        other = copy(self)
        other._asked = tuple(shares)
        return other

    def named(self, kind: str, target: int) -> str:
        """Name of a baseline of a target, such as ``uniform@0.6``, with the share as it was asked for."""
        return f"{kind}@{(self._asked or self.targets)[target]:.10g}"

    @abstractmethod
    def parse(self, text: str) -> C:
        """Candidate with this canonical text.

        Raises:
            ValueError: if it is not the text of a candidate of this space.
        """

    @abstractmethod
    def baselines(self) -> dict[str, C]:
        """Baselines by name, measured first in every study.

        ``dense``; then the reference of each target, named after its kind and target, such as ``uniform@0.6``; then
        any others, by plain names or likewise.
        """

    @abstractmethod
    def target_of(self, candidate: C) -> int | None:
        """Index of the target that the candidate meets, or None (as for the dense model)."""

    def _met_target(self, candidate: C) -> int:
        """Index of the target that the candidate meets.

        Raises:
            ValueError: if it meets none.
        """
        target = self.target_of(candidate)
        if target is None:
            raise ValueError(
                f"Expected `candidate` to meet a target, got {candidate.text!r}. Call `repair` first."
            )
        return target

    @abstractmethod
    def sample(self, rng: np.random.Generator, target: int) -> C:
        """A random candidate that meets the target."""

    @abstractmethod
    def mutate(self, candidate: C, rng: np.random.Generator) -> C:
        """A neighbour that meets the same target; equal to the candidate only if there is no other."""

    def mutate_after(self, candidate: C, depth: float, rng: np.random.Generator) -> C:
        """A neighbour as by `mutate` that has the first blocks in common with the candidate.

        Neighbours after the same depth share these blocks' computation. In a space without an order of blocks, and
        where no such neighbour is found, any neighbour.

        Args:
            depth: share of the blocks that stay as they are, in [0, 1), rounded down to whole blocks.
        """
        return self.mutate(candidate, rng)

    @abstractmethod
    def crossover(self, first: C, second: C, rng: np.random.Generator) -> C:
        """A recombination of two candidates that meets the target of the first."""

    @abstractmethod
    def repair(self, candidate: C, target: int, rng: np.random.Generator) -> C:
        """The candidate itself if it meets the target, else a similar one that does."""

    @abstractmethod
    def cost(self, candidate: C) -> Mapping[str, float]:
        """Exact costs by name, computed without building the model; see each space."""

    @abstractmethod
    def config(self, candidate: C) -> Mapping[str, Any]:
        """Plain configuration for the pruners, as a person could write it."""

    def portable(self, candidate: C, linears: Sequence[Prunable]) -> Mapping[str, Any]:
        """Plain form of a candidate that fits other models too: units by relative depth and role.

        `Pruner.fitted` is its inverse on a model. A form whose ``blocks`` have their own shares lists them by depth.

        Args:
            linears: of the dense model.

        Raises:
            ValueError: if candidates of the space have none.
        """
        raise ValueError(
            f"Expected a space whose candidates fit other models, got {type(self).__name__}, which gives no such form."
        )

    def typeset(self, candidate: C) -> str:
        """The candidate in LaTeX's math mode, or "" if it has no such form."""
        return ""

    def locality_key(self, candidate: C) -> Any:
        """Sort key: neighbouring candidates share computation when they are measured in one batch."""
        return candidate.text

    # --- parameters, for samplers such as Optuna's ---

    def parameters(self) -> tuple[IntParameter, ...]:
        """Parameters of a candidate; none if the space has no such form.

        A conditional space lists all of its parameters; `from_parameters` ignores those that don't apply.
        """
        return ()

    def to_parameters(self, candidate: C) -> dict[str, int]:
        """Values of the candidate's parameters, by name."""
        return {}

    def from_parameters(self, values: Mapping[str, int], target: int, rng: np.random.Generator) -> C:
        """Candidate with these values, repaired to meet the target.

        Samplers ignore targets: `to_parameters` gives them the values after the repair.

        Raises:
            ValueError: if the space has no parameters.
        """
        raise ValueError("Expected a space with parameters, got one without. Use another controller.")


class SeparableSpace(Space[C]):
    """Space of candidates with one option (an index) for each slot, and a known usage of each option.

    For controllers that measure slots alone and solve for the best combination.
    """

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the slots."""

    @abstractmethod
    def options(self, slot: int) -> Sequence[int]:
        """Options of a slot, ascending in usage; option 0 is that of the dense model."""

    @abstractmethod
    def usage(self, slot: int, option: int) -> int:
        """Contribution of the option to the target, in the space's integer unit (e.g. weights removed)."""

    @abstractmethod
    def share(self, slot: int, option: int) -> float:
        """Fraction of the slot removed by the option, in [0, 1] (e.g. its sparsity)."""

    @abstractmethod
    def usage_bounds(self, target: int) -> tuple[int, int]:
        """Smallest and largest total usage that meet the target, both inclusive."""

    @abstractmethod
    def assemble(self, options: Sequence[int]) -> C:
        """Candidate with these options, one a slot; it need not meet a target."""

    @abstractmethod
    def disassemble(self, candidate: C) -> tuple[int, ...]:
        """Inverse of `assemble`."""

    def block_of(self, slot: int) -> int:
        """Index of the slot's block; by default each slot is a block of its own."""
        return slot

    # --- derived methods ---

    def locality_key(self, candidate: C) -> Any:
        """The options: candidates with equal prefixes share their first blocks."""
        return self.disassemble(candidate)

    def parameters(self) -> tuple[IntParameter, ...]:
        """Position of each slot's option."""
        return tuple(
            IntParameter(name, 0, len(self.options(slot)) - 1) for slot, name in enumerate(self.slots)
        )

    def to_parameters(self, candidate: C) -> dict[str, int]:
        chosen = enumerate(self.disassemble(candidate))
        positions = [list(self.options(slot)).index(option) for slot, option in chosen]
        return dict(zip(self.slots, positions, strict=True))

    def from_parameters(self, values: Mapping[str, int], target: int, rng: np.random.Generator) -> C:
        options = [self.options(slot)[values[name]] for slot, name in enumerate(self.slots)]
        return self.repair(self.assemble(options), target, rng)


@dataclass(frozen=True)
class Requirement:
    """Condition that another parameter, if it applies, has one of these values."""

    parameter: str
    values: frozenset[int]


@dataclass(frozen=True)
class IntParameter:
    """Integer parameter.

    Args:
        name: unique in its space.
        low: the smallest value.
        high: the largest value, >= low.
        categorical: values have no order; else neighbouring values mean similar candidates.
        when: conditions, all of which must hold for the parameter to apply; each names an earlier parameter.

    Raises:
        ValueError: if `high` is below `low`.
    """

    name: str
    low: int
    high: int
    categorical: bool = False
    when: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"Expected `high` >= `low`, got {self.low} to {self.high} at {self.name}.")

    def applies(self, values: Mapping[str, int]) -> bool:
        """True if the parameter applies, given the values of the earlier ones that apply."""
        return all(r.parameter not in values or values[r.parameter] in r.values for r in self.when)
