"""What recipes are carried out on: the dense model, the pools of calibration text, and statistics by choice of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.choose import choose
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.calibration.pool import Pool
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout
from secateur.pruners.recipes.allocation.layers import Profile
from secateur.pruners.stores.recent import Recent
from secateur.spaces.shape import ModelShape, Prunable, split_protected

MADE_BYTES = 1 << 30
"""Masks and weights that were made lately are kept up to so many bytes."""

N_SAMPLES = 4
"""So many choices of calibration windows are held; statistics of others are in the cache."""


@dataclass(frozen=True)
class Sample:
    """Calibration windows that a recipe chooses, and what they say of the dense model.

    Args:
        tokens: the windows.
        sha256: of them, with their number.
        statistics: collected as far as they are asked for.
    """

    tokens: Int[Tensor, "samples length"]
    sha256: str
    statistics: CalibrationStatistics


@dataclass(frozen=True)
class RecipeContext:
    """Made while the model is dense.

    Args:
        anatomy: the live model.
        model: what tells this model from others, in one text.
        pools: the text that calibration samples are chosen from, by the names of sources.
        cache: of statistics.
        shape: what exact costs are counted from, with blocks where structure goes.
        seed: of choices, and of whatever methods draw.
        damp: of second moments, as a fraction of their mean diagonal.
        protect: patterns of names of projections that stay dense.
        profile: for rules that follow one.
    """

    anatomy: Anatomy
    model: str
    pools: Mapping[str, Pool]
    cache: StatisticsCache
    shape: ModelShape
    seed: int
    damp: float
    protect: Sequence[str] = ()
    profile: Profile = ()
    made: Recent[Mapping[str, Any]] = field(default_factory=lambda: Recent(MADE_BYTES))
    _samples: dict[str, Sample] = field(default_factory=dict)
    _scores: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def protected(self) -> frozenset[str]:
        """Full names of the projections that stay dense."""
        linears = [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in self.anatomy.linears]
        return frozenset(linear.name for linear in split_protected(linears, self.protect)[1])

    @cached_property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """Where the units of the model are; the model must be dense when they are asked for first."""
        return find_layouts(self.anatomy)

    def sample(self, calibration: Mapping[str, Any]) -> Sample:
        """The windows that a recipe chooses, with statistics of the dense model on them.

        Raises:
            ValueError: if the pools have too few windows of this choice.
        """
        name = json.dumps(calibration, sort_keys=True)
        found = self._samples.pop(name, None) or self._new_sample(calibration)
        self._samples[name] = found  # the last one is the one used last
        while len(self._samples) > N_SAMPLES:
            del self._samples[next(iter(self._samples))]
        return found

    def holds(self, calibration: Mapping[str, Any]) -> bool:
        """Whether this choice is one of those used last."""
        return json.dumps(calibration, sort_keys=True) in self._samples

    def _new_sample(self, calibration: Mapping[str, Any]) -> Sample:
        tokens = choose(self.pools, calibration, self.seed)
        sha256 = f"{tokens_sha256(tokens)}-{len(tokens)}"  # the same tokens in other windows are another text
        forward = calibration.get("gradients") == "forward"
        identity = f"{self.model} {sha256}"
        return Sample(
            tokens,
            sha256,
            CalibrationStatistics(self.anatomy, tokens, self.cache, identity, forward=forward),
        )

    def of_blocks(
        self, name: str, sample: Sample, make: Callable[[], tuple[float, ...]]
    ) -> tuple[float, ...]:
        """Scores of all blocks by a metric on some texts, made once."""
        key = (name, sample.sha256)
        if key not in self._scores:
            self._scores[key] = make()
        return self._scores[key]
