"""Finer levels around what a search found, and a search of them: ``refine``."""

from __future__ import annotations

import pytest

from secateur.pruners.weights.level_store import LevelStore
from secateur.pruners.weights.pruner import AllocationPruner
from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.loop.loop import Observer
from secateur.search.settings.settings import identity, settings_from
from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
from secateur.spaces.levels import n_zeros
from tests.models import small_anatomy
from tests.runs import LINEARS, SHAPE

RAW = {
    "model": "tiny",
    "space": {"metric": "sparsegpt", "target": 0.5, "step": 0.1, "refine": 1},
    "controller": {"kind": "evolution", "offspring": 3},
    "evaluator": {"window": 64, "calibration_tokens": 512, "fidelities": [256], "test_tokens": 256},
    "budget": {"evaluations": 9},
    "executor": {"kind": "local", "threads": 1, "batch": 3},
}


def settings_with(**changes):
    return settings_from({**RAW, **{k: {**RAW[k], **v} for k, v in changes.items()}})


class Lines(list):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stages") / "run"
    app.search(settings_with(), directory)
    return directory


# --- the space around an allocation ---

FOUND = dict(zip((x.name for x in LINEARS), (0.5, 0.1, 0.3, 0.1, 0.5, 0.3), strict=True))


def around(found, **changes):
    of = AllocationSettings(target=0.3, step=0.05, max_sparsity=0.6, found=found, **changes)
    return build_allocation(of, LINEARS, SHAPE)


def test_levels_lie_up_to_four_steps_around_the_found_one():
    space = around(FOUND)
    assert space.levels[LINEARS[0].name] == (0.0, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
    assert space.levels[LINEARS[1].name] == (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    assert space.levels[LINEARS[2].name] == (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    assert dict(space.config(space.baselines()["found@0.3"])["sparsity"]) == FOUND
    assert [space.share(1, option) for option in space.options(1)] == list(space.levels[LINEARS[1].name])


def test_levels_of_a_number_of_weights_are_that_number_apart_around_the_found_one():
    space = around(FOUND, step_weights=8)
    for slot, linear in enumerate(LINEARS):
        zeros = [space.usage(slot, option) for option in space.options(slot)]
        wanted = [n_zeros(FOUND[linear.name], linear.n_weights) + 8 * k for k in range(-4, 5)]
        assert zeros == [0, *(n for n in wanted if 0 < n <= 0.6 * linear.n_weights)]
    assert AllocationSettings(step_weights=9, refine=1, around=2).refined(FOUND).step_weights == 4


def test_what_does_not_fit_around_is_refused():
    with pytest.raises(ValueError, match=r"sparsity of each linear in `found`, got None at model\.layers\.1"):
        around(dict(list(FOUND.items())[:3]))
    for wrong in ({"target": [0.4, 0.5]}, {"group_size": 4}):
        with pytest.raises(UsageError, match=r"one `space\.target` and no `group_size` with `refine`, got"):
            settings_with(space=wrong)


def test_a_stage_of_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"`space\.found` to name the 14 projections .*, got 6, of another model"
    ):
        AllocationPruner.check_model(AllocationSettings(found=FOUND), small_anatomy())


# --- searches ---


def test_the_second_stage_lies_around_the_best_of_the_first(refined):
    first, second = app.open_run(refined), app.open_run(refined / "refined")
    assert app.last_stage(refined) == refined / "refined"
    best = min(
        (t for t in first.trials() if t.measurement.values["sparsity"] > 0),
        key=lambda t: t.measurement.values["loss"],
    )
    of = second.settings.space
    assert of.found == first.allocation(best)
    assert (of.step, of.refine, of.statistics) == (0.05, 0, "expected")
    assert second.allocation(second.baselines["found@0.5"]) == first.allocation(best)
    assert second.study.spent.evaluations == first.study.spent.evaluations == 9
    levels = second.space.levels
    assert max(map(len, levels.values())) == 10
    for trial in second.trials()[1:]:
        for name, sparsity in second.allocation(trial).items():
            assert sparsity in levels[name]


@pytest.mark.usefixtures("forked_reload")
def test_the_exported_model_is_what_was_searched_and_the_found_one_is_pruned_sequentially(refined, tmp_path):
    run = app.open_run(refined / "refined")
    for trial in (run.trials()[-1], run.baselines["found@0.5"]):
        summary = run.export(trial, tmp_path / str(trial.number))
        searched, exported = (summary.measured[f"search:256, as {x}"]["kl"] for x in ("searched", "exported"))
        assert exported == pytest.approx(searched, rel=1e-5)
    behind = run.export(trial, tmp_path / "behind", calibration="sequential")
    assert behind.measured["search:256, as exported"]["kl"] == pytest.approx(searched, rel=1e-5)


def test_the_store_has_the_levels_of_each_linear_alone(refined):
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.loading import load_model

    space = app.open_run(refined / "refined").space
    anatomy = dissect(load_model("tiny", dtype="float32").model)
    store = LevelStore(refined / "refined" / "levels", anatomy, space.levels)
    for linear in anatomy.linears:
        for level, sparsity in enumerate(space.levels[linear.name]):
            zeros = int((store.weight(linear, level) == 0).sum())
            assert zeros == pytest.approx(sparsity * linear.n_weights, abs=1)


def test_a_finished_search_of_two_stages_measures_nothing_again(refined):
    before = app.open_run(refined / "refined").study.spent
    said = Lines()
    outcome = app.search(settings_with(), refined, say=said)
    assert f"searching finer levels in {refined / 'refined'}" in said
    assert outcome.spent == before


class StopsAt(Observer):
    """Asks the search to stop after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.left, self.search = rounds, None

    def on_ready(self, search, executor) -> None:
        self.search = search

    def on_trials(self, trials, spent) -> None:
        self.left -= 1
        if self.left == 0:
            self.search.stop()


def test_a_search_that_was_stopped_in_either_stage_goes_on_as_if_it_had_not(refined, tmp_path):
    directory = tmp_path / "run"
    for rounds in (1, 5):
        stops = StopsAt(rounds)
        outcome = app.search(settings_with(), directory, observers=[stops], on_ready=stops.on_ready)
        assert outcome.reason == "stopped"
    assert app.last_stage(directory) == directory / "refined"
    app.search(settings_with(), directory)
    for stage in ("", "refined"):
        one, other = (app.open_run(x / stage) for x in (refined, directory))
        assert [t.measurement.candidate for t in one.trials()] == [
            t.measurement.candidate for t in other.trials()
        ]


def test_a_stage_keeps_what_it_began_around_when_the_first_goes_on(refined, tmp_path):
    import shutil

    directory = shutil.copytree(refined, tmp_path / "run")
    began = app.open_run(directory / "refined").settings.space.found
    app.search(settings_with(budget={"evaluations": 15}), directory)
    assert app.open_run(directory).study.spent.evaluations == 15
    second = app.open_run(directory / "refined")
    assert second.study.spent.evaluations == 15
    assert second.settings.space.found == began


def test_stages_do_not_change_what_a_search_was():
    plain = settings_with(space={"refine": 0})
    assert identity(plain) == identity(settings_with())
    assert "found" not in identity(plain)["space"]
    of = settings_with(space={"refine": 0, "found": {"a": 0.5}})
    assert identity(of) != identity(settings_with(space={"refine": 0, "found": {"a": 0.4}}))
