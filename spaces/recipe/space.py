"""The space `recipe`: calibration data, importance metric, allocation and repair, searched together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from secateur.spaces.architecture.candidate import GONE
from secateur.spaces.architecture.cost import cost, dense_of
from secateur.spaces.levels import check_ascending, n_zeros
from secateur.spaces.method import Unit
from secateur.spaces.recipe.candidate import DENSE, Recipe
from secateur.spaces.recipe.choices import (
    SCHEDULE,
    Choice,
    Items,
    Subspace,
    Tree,
    items_of,
    items_of_known,
    plain_of,
)
from secateur.spaces.recipe.groups import GROUP_SIZE, goes_with_groups
from secateur.spaces.shape import ModelShape
from secateur.spaces.space import IntParameter, Space

ATTEMPTS = 20
STEP = 0.7  # probability that an ordered choice changes to a neighbouring option, else to any


class RecipeSpace(Space[Recipe]):
    """Recipes of one unit, at one or more target sparsities.

    AdaPruner (Kong et al. 2025, arXiv 2503.06184) searches calibration data and metric together; the parameters of
    both are inferred, since the paper's text does not give them. Here allocation and repair are searched too.

    Costs: ``sparsity``, ``params``, ``size_bytes``, ``macs``, ``kv_bytes`` and, with a latency table, latencies. The
    structure that a recipe removes is only known after it has run: for structure and blocks all costs except the
    sparsity are interpolated between the dense model and one without blocks, for experts they are those of the same
    number in each mixture, and the evaluator reports exact ones.

    Args:
        targets: shares to remove, ascending.
        sources: calibration text by name; "": the evaluator's calibration set.
        start: published recipe that is the reference, and gives the values that are not searched.
        known: further published recipes, measured first.

    Raises:
        ValueError: if targets are out of order, or the shape has no blocks to cut, or no experts.
    """

    shown_as = "recipe"

    def __init__(
        self,
        unit: Unit,
        targets: Sequence[float],
        tree: Tree,
        sources: Mapping[str, str],
        start: str,
        known: Sequence[str],
        n_weights: int,
        shape: ModelShape,
    ) -> None:
        check_ascending("target", targets)
        if unit != "weights" and not shape.blocks:
            raise ValueError(f"Expected a model with known block shapes for recipes of {unit}, got none.")
        if unit == "experts" and not any(block.experts for block in shape.blocks):
            raise ValueError(
                "Expected a model with a mixture of experts for recipes of experts, got one without. Set `space.unit` "
                "to weights, structure or blocks."
            )
        self.unit = unit
        self.sources = dict(sources)
        self._targets = tuple(targets)
        self._tree = tree
        self._known = tuple(dict.fromkeys([start, *known]))
        self._n_weights = n_weights
        self._shape = shape

    @property
    def targets(self) -> tuple[float, ...]:
        return self._targets

    @property
    def choices(self) -> tuple[Choice, ...]:
        return self._tree.choices

    def parse(self, text: str) -> Recipe:
        recipe = Recipe.parse(text)
        if recipe.is_dense:
            return recipe
        plain = recipe.plain
        if plain["unit"] != self.unit:
            raise ValueError(f"Expected a recipe of {self.unit}, got one of {plain['unit']}: {text[:80]!r}.")
        for name in plain["calibration"]["sources"]:
            if name not in self.sources:
                raise ValueError(
                    f"Expected sources out of {', '.join(self.sources)}, got {name!r} in {text[:80]!r}."
                )
        return recipe

    def baselines(self) -> dict[str, Recipe]:
        found = {DENSE: Recipe(DENSE)}
        for name in self._known:
            for target in range(len(self._targets)):
                recipe = self.known(name, target)
                if recipe not in found.values():
                    found[self.named(name, target)] = recipe
        return found

    def known(self, name: str, target: int) -> Recipe:
        """Published recipe with the space's calibration data, and its group size if there is one that it can have."""
        items, size = items_of_known(name), self._tree.group_size
        if size is not None and goes_with_groups(items, size):
            items[GROUP_SIZE] = size
        return self._completed(items, self._targets[target])

    def target_of(self, candidate: Recipe) -> int | None:
        indices = {float(f"{target:.10g}"): index for index, target in enumerate(self._targets)}
        return None if candidate.is_dense else indices.get(candidate.sparsity)

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> Recipe:
        """Random recipe: uniform over the options of every applicable choice."""
        return self._completed({}, self._targets[target], rng)

    def mutate(self, candidate: Recipe, rng: np.random.Generator) -> Recipe:
        """One or two changed choices, ordered ones mostly to a neighbour; newly applicable choices are random."""
        items = self._items(candidate)
        active = self._tree.active(items)
        for _ in range(ATTEMPTS if active else 0):
            n_changes = min(int(rng.integers(1, 3)), len(active))
            picked = [active[i] for i in rng.choice(len(active), n_changes, replace=False)]
            changed = items | {choice.path: _another(choice, items[choice.path], rng) for choice in picked}
            found = self._completed(changed, candidate.sparsity, rng)
            if found != candidate:
                return found
        return self._any_neighbour(candidate, rng)

    def _any_neighbour(self, candidate: Recipe, rng: np.random.Generator) -> Recipe:
        """The first neighbour in a systematic order; the recipe itself if there is none."""
        items = self._items(candidate)
        for choice in self._tree.active(items):
            for option in choice.options:
                found = self._completed(items | {choice.path: option}, candidate.sparsity, rng)
                if found != candidate:
                    return found
        return candidate

    def crossover(self, first: Recipe, second: Recipe, rng: np.random.Generator) -> Recipe:
        """Uniform crossover: each section from either parent; the schedule is the first one's unless it is searched."""
        pair = self._items(first), self._items(second)
        of = [(section, pair[rng.integers(2)]) for section in get_args(Subspace)]
        of.append((SCHEDULE, pair[rng.integers(2) if self._tree.has_schedules else 0]))
        items = {p: v for section, held in of for p, v in held.items() if p.partition(".")[0] == section}
        return self._completed(items, first.sparsity)

    def repair(self, candidate: Recipe, target: int, rng: np.random.Generator) -> Recipe:
        met = self.target_of(candidate) == target
        return candidate if met else self._completed(self._items(candidate), self._targets[target])

    def _items(self, candidate: Recipe) -> Items:
        """Items of a recipe, with the space's group size if there is one; of the dense model those of the start."""
        recipe = self.known(self._known[0], 0) if candidate.is_dense else candidate
        size = self._tree.group_size
        held = {} if size is None else {GROUP_SIZE: size}
        return items_of(recipe.plain, tuple(self.sources)) | held

    def _completed(self, items: Items, sparsity: float, rng: np.random.Generator | None = None) -> Recipe:
        """Recipe of items; missing ones are random, or without a generator those of the base."""
        fill = self._tree.default if rng is None else lambda choice: _any(choice, rng)
        return Recipe.of(plain_of(self._tree.completed(items, fill), self.unit, sparsity))

    # --- meaning of a candidate ---

    def cost(self, candidate: Recipe) -> Mapping[str, float]:
        if self.unit == "weights":
            return self._shape.with_zeros(n_zeros(candidate.sparsity, self._n_weights), self._n_weights)
        if self.unit == "experts":
            return cost_of_experts(self._shape, candidate.sparsity)
        dense = cost(self._shape, [dense_of(block) for block in self._shape.blocks])
        nothing = cost(self._shape, [GONE] * len(self._shape.blocks))
        return {name: value + candidate.sparsity * (nothing[name] - value) for name, value in dense.items()}

    def config(self, candidate: Recipe) -> Mapping[str, Any]:
        """Plain form; for the dense model that of the start with sparsity 0."""
        if candidate.is_dense:
            return self.known(self._known[0], 0).plain | {"sparsity": 0}
        return candidate.plain

    def locality_key(self, candidate: Recipe) -> Any:
        """The calibration data first: statistics are collected once for each."""
        return candidate.text.split(" | ")[1:2], candidate.text

    # --- parameters ---

    def parameters(self) -> tuple[IntParameter, ...]:
        return self._tree.parameters()

    def to_parameters(self, candidate: Recipe) -> dict[str, int]:
        """Positions of applicable choices whose value is an option; none for the dense model."""
        items: Items = {} if candidate.is_dense else self._items(candidate)
        positions = {c.path: c.position(items[c.path]) for c in self._tree.active(items)}
        return {path: position for path, position in positions.items() if position is not None}

    def from_parameters(self, values: Mapping[str, int], target: int, rng: np.random.Generator) -> Recipe:
        items = {c.path: c.options[values[c.path]] for c in self.choices if c.path in values}
        return self._completed(items, self._targets[target], rng)


def cost_of_experts(shape: ModelShape, sparsity: float) -> dict[str, float]:
    """Costs of a model whose mixtures all lose this share of their routed experts, to the nearest number."""
    kept = []
    for block in shape.blocks:
        whole, of = dense_of(block), block.experts
        if of is not None:
            n_kept = round((1 - sparsity) * block.ffn_width / of.multiple) * of.multiple
            whole = whole._replace(ffn=min(max(n_kept, of.fewest), block.ffn_width))
        kept.append(whole)
    return cost(shape, kept) | {"sparsity": sparsity}


def _any(choice: Choice, rng: np.random.Generator) -> Any:
    return choice.options[rng.integers(len(choice.options))]


def _another(choice: Choice, value: Any, rng: np.random.Generator) -> Any:
    """A different option."""
    position = choice.position(value)
    if position is not None and choice.ordered and rng.random() < STEP:
        near = [i for i in (position - 1, position + 1) if 0 <= i < len(choice.options)]
        return choice.options[near[rng.integers(len(near))]]
    others = [i for i in range(len(choice.options)) if i != position]
    return choice.options[others[rng.integers(len(others))]]
