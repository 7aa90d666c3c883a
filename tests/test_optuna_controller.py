from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import optuna
import pytest
from pydantic import ValidationError

from secateur.search.controller import Trial
from secateur.search.controllers.optuna.controller import Optuna, OptunaSettings
from secateur.search.controllers.optuna.samplers import SAMPLERS
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.errors import UsageError
from secateur.search.results.front import non_dominated
from secateur.search.settings.settings import settings_from
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.allocation.space import Allocation, AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit
from secateur.spaces.space import IntParameter

SHAPE = ModelShape(n_params=10_000, bytes_per_param=2, macs_per_token=10_000, kv_bytes_per_token=10)
FIDELITIES = (Fidelity("search", 64), Fidelity("search", 256))
LARGEST = FIDELITIES[-1]


def space_of(n_units: int = 6, targets: tuple[float, ...] = (0.5,), n_levels: int = 10) -> AllocationSpace:
    units = [Unit(f"u{i}", (100 * (1 + i % 3),), i, (f"u{i}",)) for i in range(n_units)]
    return AllocationSpace(units, (), [level / 10 for level in range(n_levels)], targets, SHAPE)


def build(space: AllocationSpace, sampler: str = "tpe", *, seed: int = 0, objectives=("loss",), **settings):
    return Optuna(space, FIDELITIES, seed, OptunaSettings(sampler=sampler, **settings), objectives)


class Bowl:
    """Loss 0 at one candidate, growing with the squared distance from it, unequally over the slots."""

    def __init__(self, space: AllocationSpace, seed: int) -> None:
        rng = np.random.default_rng(1000 + seed)  # not as `random` draws
        self.space = space
        while (best := space.sample(rng, 0)) and np.std(best.levels) < 1.5:
            pass  # the uniform candidate, which all start from, is no near miss
        self.best = best
        self.weights = rng.uniform(0.2, 2, len(space.slots))

    def __call__(self, candidate: Allocation) -> Measurement:
        apart = np.subtract(candidate.levels, self.best.levels) / 10
        values = {"loss": float(self.weights @ apart**2), **self.space.cost(candidate)}
        return Measurement(candidate.text, LARGEST, values)


def spend(controller, measure, n: int, *, batch: int = 8) -> list[Measurement]:
    """What the first `n` proposals measured, in order."""
    done: list[Measurement] = []
    while len(done) < n and (proposals := controller.ask(min(batch, n - len(done)))):
        measured = [measure(proposal.candidate) for proposal in proposals]
        controller.tell([Trial(len(done) + i, m) for i, m in enumerate(measured)])
        done += measured
    return done


def best_loss(measurements: list[Measurement]) -> float:
    return min(m.values["loss"] for m in measurements)


# --- it searches ---


@cache
def random_loss(seed: int, n: int) -> float:
    bowl = Bowl(space_of(), seed)
    return best_loss(spend(Random(bowl.space, FIDELITIES, seed, RandomSettings()), bowl, n))


@pytest.mark.parametrize(
    ("sampler", "n", "options"),
    [("tpe", 60, {}), ("nsga2", 120, {"population_size": 16}), ("cmaes", 120, {})],
)
def test_samplers_beat_random_candidates(sampler, n, options):
    found, random = [], []
    for seed in range(10):
        bowl = Bowl(space_of(), seed)
        found.append(best_loss(spend(build(bowl.space, sampler, seed=seed, options=options), bowl, n)))
        random.append(random_loss(seed, n))
    assert np.mean(found) < 0.5 * np.mean(random)
    assert sum(a < b for a, b in zip(found, random, strict=True)) >= 8


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_objectives_give_a_front_over_the_targets(sampler):
    space = space_of(targets=(0.3, 0.4, 0.5, 0.6))
    bowl = Bowl(space, 1)
    options = {"population_size": 16} if sampler == "nsga2" else {}
    done = spend(build(space, sampler, objectives=("loss", "sparsity"), options=options), bowl, 100)
    front = non_dominated([Trial(i, m) for i, m in enumerate(done)], ("loss", "sparsity"))
    uniform = {b: bowl(space.baselines()[f"uniform@{t}"]).values["loss"] for b, t in enumerate(space.targets)}
    met = {space.target_of(space.parse(t.measurement.candidate)): t.measurement.values["loss"] for t in front}
    assert len(met) >= 2
    assert all(loss < uniform[target] for target, loss in met.items())


def test_gp_proposes_for_one_objective_and_for_two():
    space = space_of(3)
    bowl = Bowl(space, 0)
    for objectives in (("loss",), ("loss", "sparsity")):
        controller = build(space, "gp", objectives=objectives, start=3, options={"n_startup_trials": 4})
        assert len({m.candidate for m in spend(controller, bowl, 6, batch=4)}) == 6


# --- what Optuna is told ---


def inside(controller: Optuna, study: int = 0) -> optuna.Study:
    return controller._studies[study]._study


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_optuna_learns_what_was_measured(sampler):
    bowl = Bowl(space_of(), 0)
    controller = build(bowl.space, sampler, start=4)
    done = spend(controller, bowl, 40)
    trials = inside(controller).trials
    assert len(trials) == len(done) == 40
    for trial, measurement in zip(trials, done, strict=True):
        assert trial.params == bowl.space.to_parameters(bowl.space.parse(measurement.candidate))
        assert trial.values == [measurement.values["loss"]]


def test_targets_have_studies_of_their_own_for_one_objective_and_share_one_for_several():
    space = space_of(targets=(0.4, 0.6))
    alone, shared = build(space), build(space, objectives=("loss", "sparsity"), start=0)
    for i in range(2):
        assert space.target_of(alone.ask(1)[0].candidate) == i
    with pytest.raises(IndexError):
        inside(shared, 1)
    spend(shared, Bowl(space, 0), 10)
    for trial in inside(shared).trials:
        options = [trial.params[slot] for slot in space.slots]
        assert space.target_of(space.assemble(options)) == trial.params["budget"]
    assert [d.name for d in inside(shared).directions] == ["MINIMIZE"] * 2
    assert all(trial.values[1] in {-0.4, -0.6} for trial in inside(shared).trials)  # in the digits that count


@pytest.mark.parametrize(("sampler", "constrained"), [("tpe", True), ("nsga3", True), ("cmaes", False)])
def test_infeasible_candidates_are_the_worst_and_violate_a_constraint(sampler, constrained):
    space = space_of()
    controller = build(space, sampler)
    texts = [proposal.candidate.text for proposal in controller.ask(3)]
    bad = Measurement(texts[0], LARGEST, infeasible="too large")
    controller.tell([Trial(0, bad)])  # nothing to compare with yet
    controller.tell([Trial(1, Measurement(texts[1], LARGEST, {"loss": 7.0}))])
    controller.tell([Trial(2, Measurement(texts[2], LARGEST, infeasible="too large"))])
    states = [(t.state.name, t.values, dict(t.constraints)) for t in inside(controller).trials]
    assert states[0] == ("FAIL", None, {})
    assert states[1] == ("COMPLETE", [7.0], {})
    assert states[2] == ("COMPLETE", [7.0], {"infeasible": 1.0} if constrained else {})
    assert len(spend(controller, Bowl(space, 0), 20)) == 20


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_results_may_never_arrive(sampler):
    bowl = Bowl(space_of(), 0)
    controller = build(bowl.space, sampler, options={"population_size": 8} if sampler == "nsga2" else {})
    texts = set()
    for _ in range(20):
        proposals = controller.ask(4)
        texts |= {proposal.candidate.text for proposal in proposals}
        controller.tell([Trial(0, bowl(proposal.candidate)) for proposal in proposals[:2]])
    assert len(texts) == 80
    assert [t.state.name for t in inside(controller).trials].count("RUNNING") == 40


def test_measurements_of_another_fidelity_teach_nothing():
    controller = build(space_of())
    (proposal,) = controller.ask(1)
    controller.tell([Trial(0, Measurement(proposal.candidate.text, FIDELITIES[0], {"loss": 1.0}))])
    assert inside(controller).trials[0].state.name == "RUNNING"


def test_an_exhausted_space_is_finished():
    space = space_of(3, n_levels=8)
    controller = build(space, "nsga2", options={"population_size": 4})
    texts = [m.candidate for m in spend(controller, Bowl(space_of(3), 0), 1000)]
    everything = {
        c.text
        for i in np.ndindex(8, 8, 8)
        if space.target_of(c := space.assemble([int(x) for x in i])) is not None
    }
    assert len(texts) == len(set(texts))
    assert set(texts) == everything
    assert controller.ask(8) == []


CHILD = """
    import sys
    sys.path[:0] = {path!r}
    from tests.test_optuna_conditions import *
    from tests.test_optuna_controller import *
    for sampler in ("tpe", "nsga2", "cmaes"):
        bowl = Bowl(space_of(targets=(0.4, 0.6)), 0)
        print([m.candidate for m in spend(build(bowl.space, sampler), bowl, 40)])
    land = landscape()
    print([m.candidate for m in spend(build(land.space, start=4), partial(land, fidelity=LARGEST), 24)])
    land = landscape(search=["metric"], metrics=["blend"])
    gp = build(land.space, "gp", start=4, options={{"n_startup_trials": 4}})
    print([m.candidate for m in spend(gp, partial(land, fidelity=LARGEST), 10, batch=2)])
"""


def test_other_processes_propose_the_same():
    paths = [str(Path(__file__).parent.parent), *filter(None, sys.path)]
    code = textwrap.dedent(CHILD).format(path=paths)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    first, second = (child.communicate()[0] for child in children)
    assert len(first.splitlines()) == 5
    assert first == second


# --- the start ---


def test_the_uniform_candidates_come_first_then_samples_of_the_space():
    space = space_of(targets=(0.4, 0.6))
    uniform = [c.text for name, c in space.baselines().items() if name != "dense"]
    for start in (0, 4):
        controller = build(space, start=start)
        assert [p.candidate.text for p in controller.ask(2)] == uniform
        assert len(inside(controller).get_trials(states=[optuna.trial.TrialState.WAITING])) == start


def run_of(directory: Path, space: AllocationSpace, found: list[Allocation]) -> Path:
    baselines = {name: c.text for name, c in space.baselines().items()}
    bowl = Bowl(space, 0)
    settings = {"objectives": ["loss", "sparsity"]}
    with Study.open_or_create(directory, settings, About({}, baselines)) as study:
        study.append([bowl(c) for c in [*space.baselines().values(), *found]])
    return directory


def test_a_front_is_proposed_first(tmp_path):
    space = space_of()
    best = Bowl(space, 0).best
    path = run_of(tmp_path / "other", space, [best])
    first, second = build(space, warm_start=path).ask(2)
    assert first.candidate == best
    assert second.candidate == space.baselines()["uniform@0.5"]


def test_a_front_of_other_targets_is_repaired_to_the_nearest(tmp_path):
    best = Bowl(space_of(), 0).best
    path = run_of(tmp_path / "other", space_of(), [best])
    space = space_of(targets=(0.2, 0.6))
    proposals = build(space, warm_start=path, objectives=("loss", "sparsity")).ask(1)
    assert space.target_of(proposals[0].candidate) == 1
    assert np.abs(np.subtract(proposals[0].candidate.levels, best.levels)).max() <= 2


def test_a_front_without_a_candidate_of_the_space_is_refused(tmp_path):
    path = run_of(tmp_path / "other", space_of(), [Bowl(space_of(), 0).best])
    with pytest.raises(ValueError, match="Expected `warm_start` to be a run with candidates of this space"):
        build(space_of(7), warm_start=path)
    with pytest.raises(UsageError, match="Expected a run directory"):
        build(space_of(), warm_start=tmp_path / "nothing")


# --- samplers by dotted name ---


class First(optuna.samplers.BaseSampler):
    """Proposes the lowest value of everything, and `more`."""

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def infer_relative_search_space(self, study, trial):
        raise AssertionError("the search space is fixed")

    def sample_relative(self, study, trial, search_space):
        return {name: distribution.low + self.more for name, distribution in search_space.items()}

    def sample_independent(self, study, trial, param_name, param_distribution):
        raise AssertionError("all parameters are in the search space")


def test_a_sampler_by_dotted_name():
    space = space_of()
    controller = build(space, f"{__name__}.First", start=0, options={"more": 2})
    uniform, near = controller.ask(2)
    levels = space.from_parameters(dict.fromkeys(space.slots, 2), 0, np.random.default_rng(0)).levels
    assert sorted(near.candidate.levels) == pytest.approx(sorted(levels), abs=2)
    assert uniform.candidate != near.candidate
    assert len(spend(controller, Bowl(space, 0), 20)) == 20


# --- bad input ---


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sampler": "nsga"}, "known `controller.sampler` .* Did you mean 'nsga3'"),
        ({"sampler": "tpe", "option": {}}, "got 'option'.*Did you mean 'options'"),
        ({"objectives": ["los"]}, "known `controller.objectives`, got 'los'.*Did you mean 'loss'"),
        ({"objectives": ["loss", "loss"]}, "each once"),
        ({"objectives": []}, "each once"),
        ({"sampler": "cmaes", "objectives": ["loss", "params"]}, "Those that take several are tpe, nsga2"),
        ({"start": -1}, "Expected `controller.start` to be greater than or equal to 0, got -1"),
    ],
)
def test_settings_are_checked(section, message):
    with pytest.raises(UsageError, match=message):
        settings_from({"controller": {"kind": "optuna", **section}})


def test_cmaes_takes_the_first_objective_of_the_search():
    controller = build(space_of(), "cmaes", objectives=("loss", "params"))
    assert len(inside(controller).directions) == 1


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("no.such.Sampler", {}, "can be imported, got 'no.such.Sampler': No module named 'no'"),
        ("optuna.samplers.NoSampler", {}, "can be imported, got 'optuna.samplers.NoSampler'"),
        ("pathlib.Path", {}, "subclass of optuna.samplers.BaseSampler, got 'pathlib.Path'"),
        ("optuna.create_study", {}, "subclass of optuna.samplers.BaseSampler"),
        ("nsga2", {"population": 3}, "sampler nsga2, got 'population'. Did you mean 'population_size'"),
        ("nsga2", {"seed": 3}, "got 'seed'"),
        ("random", {"x": 3}, "got 'x'. It has none"),
        (
            "nsga2",
            {"population_size": 1},
            "the sampler nsga2 takes, got {'population_size': 1}: .*greater than",
        ),
    ],
)
def test_samplers_are_checked_when_built(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        build(space_of(), sampler, options=options)


def test_a_slow_sampler_says_so():
    with pytest.warns(UserWarning, match="sampler gp with 16 parameters takes seconds"):
        controller = build(space_of(16), "gp")
    with pytest.warns(UserWarning, match="more than 200 trials"):
        controller.ask(201)
    controller.ask(10)  # said once


def test_settings_are_frozen_and_complete():
    settings = OptunaSettings()
    with pytest.raises(ValidationError):
        settings.sampler = "gp"
    assert OptunaSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert all(row.path.startswith("optuna.samplers.") for row in SAMPLERS.values())


# --- parameters of a space ---


def test_parameters_are_the_slots_and_lead_back_to_the_candidate():
    space = space_of(3)
    assert space.parameters() == tuple(IntParameter(f"u{i}", 0, 9) for i in range(3))
    rng = np.random.default_rng(0)
    for _ in range(20):
        candidate = space.sample(rng, 0)
        assert space.from_parameters(space.to_parameters(candidate), 0, rng) == candidate
    repaired = space.from_parameters({"u0": 0, "u1": 0, "u2": 0}, 0, rng)
    assert space.target_of(repaired) == 0


def test_parameters_are_checked():
    with pytest.raises(ValueError, match=r"Expected `high` >= `low`, got 1 to 0 at x"):
        IntParameter("x", 1, 0)
