"""The extension point `Space`: what can be searched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from secateur.spaces.parameters import IntParameter


class Candidate(Protocol):
    """A small immutable value with one canonical text: its identity, cache key and stored form."""

    @property
    def text(self) -> str:
        """Canonical text; `Space.parse` is its inverse."""
        ...


C = TypeVar("C", bound=Candidate)


class Space(ABC, Generic[C]):
    """Candidates, how to sample, vary, repair, print and parse them, and their exact cost.

    What a target measures is the space's own business (sparsity, parameters, latency); targets are numbered,
    smallest pruning first.

    `shown_as` is the heading under which tables show a candidate's text, or "" if it is nothing to read. `stand_ins`
    names, by canonical text, costs that a candidate does not have: their numbers rank it, and are nothing to show.

    No method changes its arguments; every random choice comes from the generator that is given.
    """

    shown_as: ClassVar[str] = ""
    stand_ins: ClassVar[Mapping[str, frozenset[str]]] = {}

    @property
    @abstractmethod
    def targets(self) -> tuple[float, ...]:
        """The targets that the search aims at, ascending; a target is named by its index."""

    @abstractmethod
    def parse(self, text: str) -> C:
        """The candidate with this canonical text.

        Raises:
            ValueError: if the text names no candidate of this space.
        """

    @abstractmethod
    def baselines(self) -> dict[str, C]:
        """Named candidates that every study measures first.

        ``dense``; then for each target the one that others are compared with, by what it is and the target, such as
        ``uniform@0.6``; then further ones, if any, by plain names or likewise.
        """

    @abstractmethod
    def target_of(self, candidate: C) -> int | None:
        """Index of the target that the candidate meets, or None (as for the dense model)."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, target: int) -> C:
        """A random candidate that meets the target."""

    @abstractmethod
    def mutate(self, candidate: C, rng: np.random.Generator) -> C:
        """A neighbour that meets the same target and differs from the candidate wherever that is possible."""

    @abstractmethod
    def crossover(self, first: C, second: C, rng: np.random.Generator) -> C:
        """A mixture of two candidates that meets the target of the first."""

    @abstractmethod
    def repair(self, candidate: C, target: int, rng: np.random.Generator) -> C:
        """The candidate itself if it meets the target, else a near one that does."""

    @abstractmethod
    def cost(self, candidate: C) -> Mapping[str, float]:
        """Exact counts, without building the model: see the space's own documentation for the names."""

    @abstractmethod
    def config(self, candidate: C) -> Mapping[str, Any]:
        """The plain configuration that a person could write and the pruners run."""

    def typeset(self, candidate: C) -> str:
        """The candidate in LaTeX's math mode; "" if it is nothing to read."""
        return ""

    def locality_key(self, candidate: C) -> Any:
        """Sort key: candidates that are neighbours by it share work when they are measured together."""
        return candidate.text

    # --- parameters, for optimisers that propose a value for each of them ---

    def parameters(self) -> tuple[IntParameter, ...]:
        """What a candidate of any target is made of; none where that can't be named.

        A space with conditions names every parameter that may apply; `from_parameters` leaves the others out
        of account.
        """
        return ()

    def to_parameters(self, candidate: C) -> dict[str, int]:
        """The values that make the candidate, by the parameters' names."""
        return {}

    def from_parameters(self, values: Mapping[str, int], target: int, rng: np.random.Generator) -> C:
        """The candidate with these values if it meets the target, else a near one that does.

        Optimisers know nothing of targets: what they propose is repaired, and `to_parameters` tells them what
        became of it.

        Raises:
            ValueError: if the space names no parameters.
        """
        raise ValueError(
            "Expected a space that names its parameters, got one that does not. Use another controller."
        )


class SeparableSpace(Space[C]):
    """A candidate chooses one option (an index) for each slot, and each option uses up a known amount of the target.

    For controllers that measure slots alone and solve for the best combination.
    """

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the slots."""

    @abstractmethod
    def options(self, slot: int) -> Sequence[int]:
        """Options of a slot, option 0 = as in the dense model; their usage of the target ascends."""

    @abstractmethod
    def usage(self, slot: int, option: int) -> int:
        """How much of the target the option uses up, in the space's integer unit (e.g. weights removed)."""

    @abstractmethod
    def share(self, slot: int, option: int) -> float:
        """Which fraction of the slot the option removes, in [0, 1] (e.g. its sparsity)."""

    @abstractmethod
    def usage_bounds(self, target: int) -> tuple[int, int]:
        """Smallest and largest total usage that count as meeting the target (both inclusive)."""

    @abstractmethod
    def assemble(self, options: Sequence[int]) -> C:
        """The candidate with these options, one a slot; it need not meet a target."""

    @abstractmethod
    def disassemble(self, candidate: C) -> tuple[int, ...]:
        """Inverse of `assemble`."""

    def block_of(self, slot: int) -> int:
        """Index of the model's block that the slot belongs to; without blocks each slot is one."""
        return slot

    # --- what follows from it ---

    def locality_key(self, candidate: C) -> Any:
        """Its options: equal beginnings mean equal first blocks."""
        return self.disassemble(candidate)

    def parameters(self) -> tuple[IntParameter, ...]:
        """The option of each slot, by its position."""
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
