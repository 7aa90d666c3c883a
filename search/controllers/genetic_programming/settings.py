"""Settings of the controller `genetic`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.spaces.section import Section


class VariationSettings(Section):
    """Relative frequencies of the operations that make new formulas.

    Args:
        crossover: replaces a subtree by one of another parent.
        subtree: replaces a subtree by a random one.
        point: replaces a node by another with as many arguments, or scales a constant.
        hoist: replaces a subtree by one of its own subtrees.
        fresh: makes a random formula.
    """

    crossover: float = Field(default=0.45, ge=0)
    subtree: float = Field(default=0.2, ge=0)
    point: float = Field(default=0.15, ge=0)
    hoist: float = Field(default=0.1, ge=0)
    fresh: float = Field(default=0.1, gt=0)


class ConstantsSettings(Section):
    """Tuning of constants by CMA-ES, at the smallest fidelity.

    Args:
        every: generations of an island between tunings.
        trees: formulas tuned each time: the best ones with constants not tuned before.
        steps: of CMA-ES.
        population: formulas a step.
        spread: initial standard deviation of a constant's logarithm.
    """

    every: int = Field(default=8, ge=1)
    trees: int = Field(default=1, ge=1)
    steps: int = Field(default=3, ge=1)
    population: int = Field(default=4, ge=2)
    spread: float = Field(default=0.5, gt=0)


class GeneticSettings(Section):
    """Settings of the controller `genetic`.

    Args:
        offspring: formulas of a generation measured on data, at the smallest fidelity.
        start: the same for the first generation of each island, of random formulas.
        oversampling: new formulas screened by the proxy for each one measured on data, if the proxy is reliable.
        chance: share of the measured formulas drawn from those the proxy rejects, so that its rank correlation with
            the loss is not measured on its favourites alone.
        trust: rank correlation, in the better half, from which on `oversampling` is used in full; it falls to 1 at
            correlation 0.
        promoted: share of the formulas measured at a fidelity that is promoted to the next one; at least one is.
        population: formulas of an island.
        elites: the best of them at the largest fidelity, which always survive.
        tournament: formulas that compete to be a parent.
        parsimony: probability that size decides a tournament in which the larger formula has the lower loss; 0 ignores
            size, any other value also ranks screening, promotion and survival by (loss, size).
        seeds: whether the population begins with the published formulas of the space.
        variation: frequencies of the operations that make new formulas.
        islands: separate populations; None: 1, or up to 4 with several asynchronous workers.
        migrate_every: generations of an island between migrations from its neighbour in the ring.
        migrants: elites copied each time.
        constants: tuning of constants; None: by mutation alone.
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
