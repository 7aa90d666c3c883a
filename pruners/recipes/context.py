"""Context of recipes: the dense model, pools of calibration text, and statistics on the chosen windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.choose import choose, sources_of
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.calibration.pool import Pool
from secateur.pruners.calibration.prompts import Prompts
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout
from secateur.pruners.models.shape import prunables
from secateur.pruners.recipes.allocation.layers import Profile
from secateur.pruners.stores.recent import Recent
from secateur.spaces.method import CONTRAST
from secateur.spaces.shape import ModelShape, split_protected

MADE_BYTES = 1 << 30
"""Limit of the masks and weights computed last."""

N_SAMPLES = 4
"""Number of choices of calibration windows in memory; statistics of others are in the cache."""


@dataclass(frozen=True)
class Sample:
    """Calibration windows that a recipe chooses, and statistics of the dense model on them.

    Args:
        tokens: the windows.
        sha256: of them, with their number.
        statistics: collected as far as they are asked for.
        sources: name of the source of each window.
    """

    tokens: Int[Tensor, "samples length"]
    sha256: str
    statistics: CalibrationStatistics
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecipeContext:
    """The dense model with all that recipes are planned from.

    Args:
        anatomy: the live model.
        model: its identity, in one text.
        pools: the text that calibration samples are chosen from, by the names of sources.
        cache: of statistics.
        shape: its sizes, with those of blocks where units are cut.
        seed: of choices of windows, and of random methods.
        dampening: of second moments, as a fraction of their mean diagonal.
        protect: patterns of names of projections that are kept dense.
        profile: for rules that follow one.
        prompts: token ids of texts that methods put before windows, by name.
    """

    anatomy: Anatomy
    model: str
    pools: Mapping[str, Pool]
    cache: StatisticsCache
    shape: ModelShape
    seed: int
    dampening: float
    protect: Sequence[str] = ()
    profile: Profile = ()
    prompts: Prompts = field(default_factory=dict)
    made: Recent[Mapping[str, Any]] = field(default_factory=lambda: Recent(MADE_BYTES))
    _samples: dict[str, Sample] = field(default_factory=dict)
    block_scores: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def protected(self) -> frozenset[str]:
        """Full names of the projections that are kept dense."""
        return frozenset(x.name for x in split_protected(prunables(self.anatomy), self.protect)[1])

    @cached_property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """Layouts of the units, experts too; the model must be dense at the first use."""
        return find_layouts(self.anatomy, experts=True)

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

    def silenced_sample(self, sample: Sample, numbers: Sequence[Mapping[Any, tuple[int, ...]]]) -> Sample:
        """The windows of a sample, with statistics of the live model with these units alone, once it is silenced."""
        digest = hashlib.sha256(repr([sorted(kept.items()) for kept in numbers]).encode()).hexdigest()
        return self.changed_sample(sample, digest[:32])

    def changed_sample(self, sample: Sample, identity: str) -> Sample:
        """The windows of a sample, with statistics of the live model once it is changed; `identity`: how."""
        sha256 = f"{sample.sha256} {identity}"
        return replace(
            sample, sha256=sha256, statistics=sample.statistics.of_another(f"{self.model} {sha256}")
        )

    def holds(self, calibration: Mapping[str, Any]) -> bool:
        """True if this choice is one of those used last."""
        return json.dumps(calibration, sort_keys=True) in self._samples

    def _new_sample(self, calibration: Mapping[str, Any]) -> Sample:
        tokens = choose(self.pools, calibration, self.seed, self.anatomy.bos)
        sha256 = f"{tokens_sha256(tokens)}-{len(tokens)}"  # the same tokens in other windows are another text
        contrast = None
        if CONTRAST in self.pools:
            as_many = {**calibration, "sources": {CONTRAST: 1}, "choose": "random"}
            contrast = choose(self.pools, as_many, self.seed, self.anatomy.bos)
            sha256 += f"-{tokens_sha256(contrast)}"
        forward = calibration.get("gradients") == "forward"
        identity = f"{self.model} {sha256}"
        statistics = CalibrationStatistics(
            self.anatomy, tokens, self.cache, identity, forward=forward, contrast=contrast
        )
        return Sample(tokens, sha256, statistics, sources_of(calibration))
