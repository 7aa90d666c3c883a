from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.pruners.masks import MAX_LEVELS, lowest, mask, prune_ranks
from secateur.spaces.levels import n_zeros

SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def scores(n_out: int, n_in: int, seed: int, *, ties: bool = False) -> torch.Tensor:
    found = torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    return (found * 3).floor() if ties else found


@given(SPARSITIES, st.integers(1, 9), st.integers(1, 12), st.booleans(), st.sampled_from(["output", "layer"]))
def test_a_mask_has_exactly_the_asked_number_of_zeros(sparsity, n_out, n_in, ties, comparison):
    keep = mask(scores(n_out, n_in, 0, ties=ties), sparsity, comparison=comparison)
    assert int((~keep).sum()) == n_zeros(sparsity, n_out * n_in)


@given(SPARSITIES, st.integers(1, 9), st.integers(1, 12))
def test_rows_of_an_output_mask_differ_by_at_most_one_zero(sparsity, n_out, n_in):
    zeros = (~mask(scores(n_out, n_in, 1), sparsity, comparison="output")).sum(1)
    assert int(zeros.max() - zeros.min()) <= 1


@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5))
def test_every_group_loses_its_number(n_pruned, n_out, n_groups):
    keep = mask(scores(n_out, 4 * n_groups, 2), n_pruned / 4, group_size=4)
    assert ((~keep).reshape(-1, 4).sum(1) == n_pruned).all()


def test_the_lowest_scores_go_and_ties_go_by_position():
    score = torch.tensor([[3.0, 1.0, 1.0, 2.0]])
    assert mask(score, 0.25).tolist() == [[True, False, True, True]]
    assert mask(score, 0.5).tolist() == [[True, False, False, True]]


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=6, unique=True), st.sampled_from(["output", "layer"])
)
def test_levels_are_nested_and_equal_to_single_masks(above, comparison):
    levels = [0.0, *sorted(above)]
    score = scores(5, 11, 3)
    ranks = prune_ranks(score, levels, comparison=comparison)
    for index, level in enumerate(levels):
        keep = ranks > index
        assert torch.equal(keep, mask(score, level, comparison=comparison))
        if index:
            assert not (keep & ~(ranks > index - 1)).any()


def test_as_many_levels_as_a_byte_holds():
    levels = [index / (MAX_LEVELS - 1) for index in range(MAX_LEVELS)]
    ranks = prune_ranks(scores(4, 200, 4), levels, comparison="layer")
    assert [int((ranks <= i).sum()) for i in range(MAX_LEVELS)] == [n_zeros(x, 800) for x in levels]


@given(st.integers(0, 20), st.integers(1, 10**7))
def test_zeros_are_rounded_to_the_nearest_number(step, size):
    exact = Fraction(step, 20)
    assert abs(n_zeros(float(exact), size) - exact * size) <= Fraction(1, 2) + Fraction(1, 10**6)


@given(st.integers(0, 10))
def test_lowest_marks_exactly_so_many(count):
    score = scores(1, 10, 5, ties=True)[0]
    chosen = lowest(score, count)
    assert int(chosen.sum()) == count
    if 0 < count < 10:
        assert score[chosen].max() <= score[~chosen].min()


def test_bad_scores_and_groups_are_refused():
    with pytest.raises(ValueError, match=r"Expected finite scores, .* at layer x"):
        mask(torch.tensor([[1.0, float("nan")]]), 0.5, name="layer x")
    with pytest.raises(
        ValueError, match=r"Expected `group_size` to divide the number of inputs, got 3 for 4"
    ):
        mask(scores(2, 4, 0), 1 / 3, group_size=3)
    with pytest.raises(ValueError, match=r"Expected 1 to 255 sparsities in \[0, 1\]"):
        mask(scores(2, 4, 0), 1.5)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 7),
    groups=st.integers(1, 6),
    sparsity=st.floats(0, 1),
    n_values=st.integers(1, 40),
    comparison=st.sampled_from(["output", "layer"]),
    grouped=st.booleans(),
)
def test_a_mask_by_selection_is_the_one_by_sorting_ties_included(
    seed, rows, groups, sparsity, n_values, comparison, grouped
):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(n_values, (rows, 4 * groups), generator=generator).float()
    kind = {"comparison": comparison, "group_size": 4 if grouped else None}
    expected = prune_ranks(score, (0.0, sparsity), **kind) > 1
    assert torch.equal(mask(score, sparsity, **kind), expected)
