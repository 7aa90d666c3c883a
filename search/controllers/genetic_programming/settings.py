"""Settings of the controller `genetic`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.spaces.section import Section


class VariationSettings(Section):
    """How often a new formula is made in which way, in proportion to each other.

    Args:
        crossover: a subtree exchanged for one of another parent's.
        subtree: a subtree made anew.
        point: a node exchanged for another of as many arguments, or a constant scaled.
        hoist: a subtree exchanged for one of its own subtrees.
        fresh: no parents.
    """

    crossover: float = Field(default=0.45, ge=0)
    subtree: float = Field(default=0.2, ge=0)
    point: float = Field(default=0.15, ge=0)
    hoist: float = Field(default=0.1, ge=0)
    fresh: float = Field(default=0.1, gt=0)


class ConstantsSettings(Section):
    """How the constants of good formulas are tuned: by CMA-ES, on the data of the smallest fidelity.

    Args:
        every: generations of an island from one tuning to the next.
        trees: formulas tuned each time: the best with constants that were not tuned before.
        steps: of CMA-ES.
        population: formulas a step.
        spread: initial standard deviation of the logarithm of a constant.
    """

    every: int = Field(default=8, ge=1)
    trees: int = Field(default=1, ge=1)
    steps: int = Field(default=3, ge=1)
    population: int = Field(default=4, ge=2)
    spread: float = Field(default=0.5, gt=0)


class GeneticSettings(Section):
    """How formulas are varied, screened, measured and kept.

    Args:
        offspring: formulas of a generation that are measured on data, at the smallest fidelity.
        start: as many in the first generation of each island, of random formulas.
        oversampling: new formulas that a proxy screens for each of them, as long as it orders them as data do.
        chance: share of them that is drawn from those the proxy would leave out, so that its rank correlation with
            the loss is not measured on its favourites alone.
        trust: rank correlation, in the better half, from which on `oversampling` is used in full; it falls to 1 at
            correlation 0.
        promoted: share of those measured at a fidelity that go on to the next one; at least one does.
        population: formulas that an island keeps.
        elites: of these the best at the largest fidelity; they never leave.
        tournament: formulas that compete to be a parent.
        parsimony: probability that size decides a tournament where the larger formula has the lower loss; with 0 size
            counts nowhere, else screening, promotion and survival rank by (loss, size), too.
        seeds: whether the population begins with the published formulas that the space compares with.
        variation: how new formulas are made.
        islands: populations that evolve apart; None: 1, or up to 4 where several workers run asynchronously.
        migrate_every: generations of an island until it takes over elites from its neighbour in the ring.
        migrants: how many.
        constants: how constants are tuned; None: by mutation alone.
    """

    kind: Literal["genetic"] = "genetic"
    offspring: int = Field(default=8, ge=1)
    start: int = Field(default=16, ge=1)
    oversampling: int = Field(default=32, ge=1)
    chance: float = Field(default=0.25, ge=0, le=1)
    trust: float = Field(default=0.7, gt=0, le=1)
    promoted: float = Field(default=0.25, gt=0, le=1)
    population: int = Field(default=32, ge=2)
    elites: int = Field(default=4, ge=1)
    tournament: int = Field(default=3, ge=1)
    parsimony: float = Field(default=0.2, ge=0, le=1)
    seeds: bool = True
    variation: VariationSettings = VariationSettings()
    islands: int | None = Field(default=None, ge=1)
    migrate_every: int = Field(default=4, ge=1)
    migrants: int = Field(default=1, ge=1)
    constants: ConstantsSettings | None = ConstantsSettings()
