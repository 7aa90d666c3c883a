"""Block-wise evaluators of small models, over levels of a few sparsities."""

from __future__ import annotations

import numpy as np
import torch

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import DenseModel
from secateur.pruners.weights.level_store import StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner
from secateur.spaces.allocation.settings import AllocationSettings
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity
from secateur.spaces.shape import ModelShape, Prunable, group
from tests.models import random_tokens, small_anatomy

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHAPE = ModelShape(10**6, 4, 10**6, 10)
SMALL, LARGE, TEST = Fidelity("search", 32), Fidelity("search", 96), Fidelity("test", 32)


def make_space(anatomy: Anatomy) -> AllocationSpace:
    linears = [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in anatomy.linears]
    return AllocationSpace(group(linears, "linear"), (), LEVELS, (0.5,), SHAPE)


def make_key(method: Method) -> StoreKey:
    return StoreKey("model", "float32", "tokens", method, LEVELS)


def pruner_of(anatomy, space, levels) -> AllocationPruner:
    pruner = AllocationPruner(AllocationSettings(), DenseModel(anatomy, "model", SHAPE), space=space)
    pruner.open(levels)
    return pruner


def make_evaluator(tmp_path, method: str = "sparsegpt", **kwargs: object) -> BlockwiseEvaluator:
    anatomy = small_anatomy(n_layers=3)
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method(method)))
    space = make_space(anatomy)
    windows = {"search": random_tokens(6, 16, 1), "test": random_tokens(2, 16, 2)}
    data = EvaluationData(anatomy, windows, [SMALL, LARGE, TEST])
    pruner = pruner_of(anatomy, space, tmp_path)
    evaluator = BlockwiseEvaluator(pruner, data, **kwargs)
    evaluator.anatomy, evaluator.space = anatomy, space  # for the tests
    return evaluator


def candidates(space: AllocationSpace, n: int) -> list[str]:
    """A family: mutants of mutants, so that prefixes are shared to different depths."""
    rng = torch.Generator().manual_seed(0)
    generator = np.random.default_rng(0)
    found = [space.baselines()["uniform@0.5"]]
    while len(found) < n:
        parent = found[int(torch.randint(len(found), (1,), generator=rng))]
        child = space.mutate(parent, generator)
        if child not in found:
            found.append(child)
    return [candidate.text for candidate in found]
