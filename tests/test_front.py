"""The front, the hypervolume, and picking by bounds."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.results.front import comparable, hypervolume_series, non_dominated
from secateur.search.results.hypervolume import exclusive_volume, hypervolume
from secateur.search.results.pick import Bound, parse_bounds, pick, pick_number
from secateur.spaces.measurement import Fidelity, Measurement

LARGE = Fidelity("search", 256)


def trials_from(rows, names=("loss", "params"), fidelity=LARGE) -> list[Trial]:
    return [
        Trial(i, Measurement(f"c{i}", fidelity, dict(zip(names, map(float, row), strict=True))))
        for i, row in enumerate(rows)
    ]


def numbers(trials) -> list[int]:
    return [trial.number for trial in trials]


def grids(n_objectives: int, max_size: int = 8):
    """Points on a small grid, so that ties are common."""
    return st.lists(st.tuples(*[st.integers(0, 4)] * n_objectives), min_size=1, max_size=max_size)


# --- the front ---


@given(st.one_of(grids(1), grids(2), grids(3, 20), grids(4, 20)))
def test_the_front_is_what_the_definition_says(rows):
    names = ("loss", "params", "macs", "kv_bytes")[: len(rows[0])]
    front = non_dominated(trials_from(rows, names), names)
    kept = {rows[t.number] for t in front}
    assert len(kept) == len(front)  # equal ones once
    for row in rows:
        beaten = any(other != row and all(a <= b for a, b in zip(other, row, strict=True)) for other in rows)
        assert (row in kept) != beaten
    assert all(t.number == rows.index(rows[t.number]) for t in front)  # the first of equal ones
    assert [rows[t.number] for t in front] == sorted(kept)


@given(grids(2), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order_of_the_trials(rows, random):
    trials = trials_from(rows)
    shuffled = random.sample(trials, len(trials))
    assert non_dominated(shuffled, ["loss", "params"]) == non_dominated(trials, ["loss", "params"])


def test_a_few_weights_are_no_trade_off():
    trials = trials_from([(1, 0.6), (2, 0.60000045), (3, 0.65)], ("loss", "sparsity"))
    assert numbers(non_dominated(trials, ["loss", "sparsity"])) == [0, 2]


def test_more_sparsity_is_better():
    trials = trials_from([(1, 0.5), (1, 0.6), (2, 0.6), (3, 0.9)], ("loss", "sparsity"))
    assert numbers(non_dominated(trials, ["loss", "sparsity"])) == [1, 3]


def test_only_feasible_trials_at_the_largest_search_fidelity_count():
    trials = trials_from([(3, 3), (2, 4)])
    trials.append(Trial(2, Measurement("a", Fidelity("search", 64), {"loss": 0.0, "params": 0.0})))
    trials.append(Trial(3, Measurement("b", Fidelity("test", 512), {"loss": 0.0, "params": 0.0})))
    trials.append(Trial(4, Measurement("c", LARGE, infeasible="no")))
    assert numbers(comparable(trials)) == [0, 1]
    assert numbers(non_dominated(trials, ["loss", "params"])) == [1, 0]
    assert numbers(non_dominated(trials, ["loss"], Fidelity("search", 64))) == [2]
    assert non_dominated([], ["loss"]) == []


def test_objectives_that_are_unknown_none_or_not_measured_are_named():
    trials = trials_from([(1, 2)])
    with pytest.raises(UsageError, match="got 'los'"):
        non_dominated(trials, ["los"])
    with pytest.raises(UsageError, match="got none"):
        non_dominated(trials, [])
    with pytest.raises(ValueError, match="trial 0 to hold macs"):
        non_dominated(trials, ["loss", "macs"])


# --- hypervolume ---


def cells(points, reference) -> int:
    """Slow and plain: unit cells of the grid below the reference that some point dominates."""
    boxes = itertools.product(*[range(int(r)) for r in reference])
    return sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in boxes
    )


@given(st.one_of(grids(1, 10), grids(2, 10), grids(3, 10), grids(4, 6)))
def test_hypervolume_equals_counting_cells(rows):
    reference = np.full(len(rows[0]), 4.0)
    assert hypervolume(np.array(rows, dtype=float), reference) == pytest.approx(
        cells(rows, reference), abs=1e-9
    )


@given(grids(3, 8), st.tuples(*[st.integers(0, 4)] * 3))
def test_the_exclusive_volume_is_what_a_point_adds(rows, point):
    reference, points = np.full(3, 4.0), np.array(rows, dtype=float)
    added = hypervolume(np.vstack([points, point]), reference) - hypervolume(points, reference)
    assert exclusive_volume(np.array(point, dtype=float), points, reference) == pytest.approx(added, abs=1e-9)


def test_in_two_dimensions_it_is_the_area_under_the_stairs():
    rng = np.random.default_rng(0)
    points = rng.random((200, 2))
    area, top = 0.0, 1.0
    for x, y in sorted(map(tuple, points)):
        if y < top:
            area += (1 - x) * (top - y)
            top = y
    assert hypervolume(points, np.ones(2)) == pytest.approx(area, rel=1e-12)


def test_the_series_grows_from_the_baselines_to_the_best_of_both():
    rows = [(0, 100), (2, 40), (1, 40), (1.5, 70), (3, 30), (0, 40)]  # dense, uniform, then the search
    series = hypervolume_series(trials_from(rows), ["loss", "params"], {"c0", "c1"})
    # Scaled: dense (0, 1), uniform (1, 0), reference (1, 1); trial 2 at (0.5, 0), trial 4 beyond the reference.
    assert series == [(0, 0), (1, 0), (2, 0.5), (3, 0.5), (4, 0.5), (5, 1.0)]


@given(grids(2, 12))
def test_the_series_ends_with_the_hypervolume_of_all(rows):
    trials = trials_from([(0, 3), (3, 0), *rows])
    series = hypervolume_series(trials, ["loss", "params"], {"c0", "c1"})
    volumes = [volume for _, volume in series]
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(hypervolume(np.array(rows) / 3.0, np.ones(2)), abs=1e-9)


def test_objectives_in_which_the_baselines_agree_are_left_out():
    rows = [(0, 100, 7), (2, 40, 7), (1, 40, 7)]
    trials = trials_from(rows, ("loss", "params", "kv_bytes"))
    assert hypervolume_series(trials, ["loss", "params", "kv_bytes"], {"c0", "c1"})[-1] == (2, 0.5)
    assert hypervolume_series(trials, ["kv_bytes"], {"c0", "c1"}) == []
    assert hypervolume_series(trials, ["loss"], {"nothing"}) == []


# --- bounds ---


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("max-params", "90e6", 90e6),
        ("max-params", "90M", 90e6),
        ("max-params", "1.5b", 1.5e9),
        ("max-params", "300 k", 300e3),
        ("max-size", "180MB", 180e6),
        ("max-size", "180mb", 180e6),
        ("max-size", "512KiB", 512 * 1024),
        ("max-size", "2GiB", 2 * 1024**3),
        ("max-size", "100B", 100),
        ("max-macs", "1.2G", 1.2e9),
        ("max-latency", "0.03s", 30),
        ("sparsity", "0.6", 0.6),
    ],
)
def test_bounds_are_read_with_their_units(name, text, limit):
    bound = Bound.parse(name, text)
    assert bound.limit == pytest.approx(limit)
    assert not bound.relative


@pytest.mark.parametrize(
    ("name", "text"),
    [("max-params", t) for t in ("", "x", "1.2.3", "-5", "90MB", "nan", "inf", "0.7xx", "1e999")]
    + [("sparsity", t) for t in ("1.5", "60%", "0.7x", "-0.1")],
)
def test_what_is_no_bound_is_refused(name, text):
    with pytest.raises(UsageError, match=f"Expected `{name}` such as "):
        Bound.parse(name, text)


def test_an_unknown_bound_and_no_bound_are_refused():
    with pytest.raises(UsageError, match="Did you mean 'max-params'"):
        Bound.parse("max-parms", "1")
    with pytest.raises(UsageError, match="got none"):
        parse_bounds({"max-params": None})
    assert parse_bounds({"max-params": None, "sparsity": "0.5"}) == (Bound.parse("sparsity", "0.5"),)


# --- pick ---

NAMES = ("loss", "params", "sparsity")
ROWS = [(0, 100, 0), (1.0, 60, 0.4), (0.9, 61, 0.39), (2.0, 40, 0.598), (1.8, 40.5, 0.595), (2.0, 39, 0.6)]
TRIALS = trials_from(ROWS, NAMES)


def picked(**texts: str) -> int:
    bounds = parse_bounds({name.replace("_", "-"): text for name, text in texts.items()})
    return pick(TRIALS, bounds, dense="c0").number


def test_the_lowest_loss_within_all_bounds_is_picked():
    assert picked(max_params="200") == 0
    assert picked(max_params="61") == 2
    assert picked(max_params="60.5") == 1
    assert picked(max_params="0.6x") == 1  # of the dense model's 100
    assert picked(max_params="0.404x") == 3  # as good as 5, and before it
    assert picked(max_params="61", sparsity="0.4") == 1
    assert picked(sparsity="0.6") == 4  # within the tolerance


@given(grids(2, 10), st.integers(0, 5))
def test_no_trial_within_the_bound_is_better_than_the_picked_one(rows, limit):
    trials = trials_from(rows)
    within = [(row[0], i) for i, row in enumerate(rows) if row[1] <= limit]
    bounds = [Bound.parse("max-params", str(limit))]
    if within:
        assert pick(trials, bounds).number == min(within)[1]
    else:
        with pytest.raises(UsageError, match="nearest is trial"):
            pick(trials, bounds)


def test_a_bound_that_no_trial_meets_names_the_nearest_and_by_how_much():
    said = "within max-params 30, got none among 6. The nearest is trial 5 with params 39, where 30 is asked for. "
    with pytest.raises(UsageError, match=re.escape(said)):
        picked(max_params="30")
    with pytest.raises(UsageError, match=re.escape("trial 5 with sparsity 0.6, ")):
        picked(sparsity="0.9")
    with pytest.raises(UsageError, match=r"Expected a trial within max-params 0\.3x, sparsity 0.4"):
        picked(max_params="0.3x", sparsity="0.4")


def test_a_bound_on_what_was_not_measured_is_refused():
    with pytest.raises(
        UsageError, match=r"got a study without it\. Use a bound on one of: loss, params, sparsity"
    ):
        picked(max_size="1MB")
    with pytest.raises(UsageError, match="Expected a measured dense model"):
        pick(TRIALS, [Bound.parse("max-params", "0.7x")], dense="never measured")
    with pytest.raises(UsageError, match="feasible trials, got none"):
        pick([], [Bound.parse("max-params", "1")])


def test_picking_by_number():
    trials = [*TRIALS, Trial(6, Measurement("x", LARGE, infeasible="too thin"))]
    assert pick_number(trials, 3) is trials[3]
    for number, said in ((-1, "got trials 0 to 6"), (7, "got trials 0 to 6"), (6, "got trial 6: too thin")):
        with pytest.raises(UsageError, match=said):
            pick_number(trials, number)
    with pytest.raises(UsageError, match="without trials"):
        pick_number([], 0)
