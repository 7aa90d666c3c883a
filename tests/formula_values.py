"""Random formulas and their values on a small layer, for the tests of formulas."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from secateur.pruners.formulas import operations
from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import (
    Apply,
    Constant,
    Terminal,
    Tree,
    plain,
)

SHAPE = (4, 6)

leaves = st.one_of(
    st.sampled_from(sorted(TERMINALS)).map(Terminal),
    st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 3.0]).map(Constant),
    st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6).map(Constant),
)


def applied(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    def with_arguments(name: str) -> st.SearchStrategy[Tree]:
        return st.tuples(*[inner] * OPERATORS[name].arity).map(lambda args: Apply(name, args))

    return st.sampled_from(sorted(OPERATORS)).flatmap(with_arguments)


trees = st.recursive(leaves, applied, max_leaves=12)
seeds = st.integers(0, 2**32 - 1)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Terminals of a small layer, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = SHAPE

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = normal(rows, columns)
    found = {
        "W": weight,
        "G": normal(rows, columns).abs(),
        "X": normal(1, columns).abs(),
        "H": normal(1, columns).exp(),
        "R": weight.abs().sum(1, keepdim=True),
        "C": weight.abs().sum(0, keepdim=True),
        "P": torch.full((1, 1), 0.25, dtype=torch.float64),
    }
    channels = {"T": normal(1, columns).abs(), "X2": normal(1, columns).abs()}
    return found | channels | {"G2": normal(rows, columns).abs()}


def value(tree: Tree, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The values of a formula, None where it is undefined. W is added so that a constant counts as defined."""
    try:
        scores(Apply("add", (Apply("mul", (Constant(0.0), tree)), Terminal("W"))), given, SHAPE)
    except FormulaError:
        return None
    return _plain(plain(tree), given).expand(SHAPE)


def _plain(formula, given):
    if isinstance(formula, str):
        return given[formula]
    if not isinstance(formula, list):
        return torch.full((1, 1), formula, dtype=torch.float64)
    return operations.OPERATIONS[formula[0]](*(_plain(x, given) for x in formula[1:]))
