"""Context of recipes over a small random model, for tests of what recipes measure."""

from __future__ import annotations

import sys
from pathlib import Path

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.pool import build_pools
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape
from secateur.pruners.recipes.context import RecipeContext
from tests.models import random_tokens, small_llama

CALIBRATION = {"sources": {"calibration": 1}, "samples": 4, "length": 32}


def small_context(directory: Path, n_layers: int) -> RecipeContext:
    """Context of a Llama of so many blocks, whose statistics are kept in the directory."""
    anatomy = dissect(small_llama(n_layers=n_layers))
    pools = build_pools(anatomy, {"calibration": random_tokens(1, 512, seed=5)[0]}, look=False)
    cache = StatisticsCache(directory, sys.maxsize)
    return RecipeContext(anatomy, "toy", pools, cache, model_shape(anatomy, 8, 4), seed=0, dampening=0.01)
