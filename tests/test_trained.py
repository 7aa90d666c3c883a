"""Light training as part of a measurement: continued bit by bit, alone with its candidate, counted, and real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.evaluators import trained
from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.trained import TrainedEvaluator, own_modules
from secateur.evaluators.training.settings import Training
from secateur.pruners.weights.level_store import build_levels
from secateur.pruners.weights.method import Method
from secateur.search import app
from secateur.search.budget import Budget
from secateur.search.controller import Proposal, Trial
from secateur.search.errors import UsageError
from secateur.search.loop.ledger import Ledger
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.spaces.measurement import Fidelity, Measurement
from tests.blockwise import make_key, make_space, pruner_of
from tests.models import count_zeros, random_tokens, small_anatomy
from tests.test_app import lines
from tests.toy import SPACE

TRAIN, SEARCH = random_tokens(8, 16, 3), random_tokens(6, 16, 1)
UNTRAINED, SHORT, LONG = (Fidelity("search", n, m) for n, m in ((32, 0), (64, 32), (96, 128)))
TEST = Fidelity("test", 32, 128)
LEARNERS = ("full", "norms", "lora")


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    directory = tmp_path_factory.mktemp("levels")
    build_levels(directory, small_anatomy(n_layers=3), random_tokens(4, 16), make_key(Method("wanda")))
    return directory


@pytest.fixture
def make(levels):
    def evaluator(**changes):
        anatomy = small_anatomy(n_layers=3)
        space = make_space(anatomy)
        data = EvaluationData(
            anatomy, {"search": SEARCH, "test": random_tokens(2, 16, 2)}, [UNTRAINED, SHORT, LONG, TEST]
        )
        pruner = pruner_of(anatomy, space, levels)
        plain = BlockwiseEvaluator(pruner, data)
        raw = {"method": "full", "tokens": 128, "batch": 1, "lr": 1e-2, "rank": 4, "schedule": "constant"}
        made = TrainedEvaluator(plain, pruner, data, Training(**{**raw, **changes}), TRAIN)
        made.anatomy, made.space = anatomy, space
        return made

    return evaluator


@pytest.fixture(scope="module")
def candidates():
    space, rng = make_space(small_anatomy(n_layers=3)), np.random.default_rng(0)
    first = space.baselines()["uniform@0.5"]
    return [first.text, space.mutate(first, rng).text, space.sample(rng, 0).text]


def values(measurements):
    return [dict(m.values) for m in measurements]


def needs(method):
    return pytest.importorskip("peft") if method == "lora" else None


@pytest.mark.parametrize("method", LEARNERS)
def test_a_survivor_goes_on_and_a_forgotten_one_is_repeated_with_equal_bits(
    make, candidates, method, monkeypatch
):
    needs(method)
    steps = count_steps(monkeypatch)
    unbroken = make(method=method).evaluate(candidates[:2], LONG)
    assert steps == [8, 8]
    going_on = make(method=method)
    going_on.evaluate(candidates, SHORT)
    assert values(going_on.evaluate(candidates[:2], LONG)) == values(unbroken)
    assert steps[2:] == [2, 2, 2, 6, 6]
    monkeypatch.setattr(trained, "STATE_BYTES", 0)
    forgetful = make(method=method)
    forgetful.evaluate(candidates, SHORT)
    assert values(forgetful.evaluate(candidates[:2], LONG)) == values(unbroken)
    assert steps[-2:] == [8, 8]


def count_steps(monkeypatch):
    steps, train = [], trained.Trainer.train

    def counted(self, n_steps):
        steps.append(n_steps)
        return train(self, n_steps)

    monkeypatch.setattr(trained.Trainer, "train", counted)
    return steps


@pytest.mark.parametrize("method", LEARNERS)
def test_training_that_learns_what_is_measured_lowers_the_loss_and_keeps_zeros(
    make, candidates, method, monkeypatch
):
    needs(method)
    zeros, sums_on = [], trained.sums_on

    def spy(anatomy, pairs):
        zeros.append(count_zeros(anatomy))
        return sums_on(anatomy, pairs)

    monkeypatch.setattr(trained, "sums_on", spy)
    evaluator = make(method=method)
    evaluator._windows = SEARCH[:4]  # the windows that are measured: random tokens generalise to nothing
    (before,) = evaluator.evaluate(candidates[:1], Fidelity("search", 64))
    (after,) = evaluator.evaluate(candidates[:1], Fidelity("search", 64, 128))
    assert after.values["kl"] < 0.9 * before.values["kl"]
    assert after.values["loss"] == after.values["kl"]
    sparsity = evaluator.space.config(evaluator.space.parse(candidates[0]))["sparsity"]
    n_weights = {linear.name: linear.n_weights for linear in evaluator.anatomy.linears}
    assert zeros == [{name: pytest.approx(sparsity[name] * n, abs=0.5) for name, n in n_weights.items()}]


def test_nothing_leaks_into_other_candidates_or_the_dense_model(make, candidates):
    first, second, third = candidates
    evaluator, fresh = make(), make()
    untrained = values(fresh.evaluate(candidates, UNTRAINED))
    weights = {name: p.clone() for name, p in evaluator.anatomy.model.named_parameters()}
    together = values(evaluator.evaluate([third, first, second], LONG))
    assert values(evaluator.evaluate(candidates, UNTRAINED)) == untrained
    assert all(torch.equal(p, weights[name]) for name, p in evaluator.anatomy.model.named_parameters())
    assert not any(p.requires_grad for p in evaluator.anatomy.model.parameters())
    assert values(fresh.evaluate([first], LONG)) == together[1:2]
    assert values(fresh.evaluate([third, second], LONG)) == [together[0], together[2]]
    assert values(make().evaluate([first], LONG)) == together[1:2]


def test_equal_models_train_equally_whatever_was_done_between(make, candidates):
    """An interrupted training leaves no state behind that is neither here nor there."""
    evaluator = make()
    evaluator.evaluate(candidates[:1], SHORT)
    expected = values(make().evaluate(candidates[:1], LONG))

    def interrupted(self, n_steps):
        train(self, 3)
        raise KeyboardInterrupt

    train = trained.Trainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluator.evaluate(candidates[:1], LONG)
    assert values(evaluator.evaluate(candidates[:1], LONG)) == expected


def test_training_that_diverges_is_infeasible_with_its_reason(make, candidates):
    evaluator = make(lr=1e30)
    first, again = evaluator.evaluate([candidates[0]] * 2, LONG)
    assert first.infeasible is not None
    assert first.infeasible.startswith("training diverged")
    assert again.infeasible == first.infeasible
    assert evaluator.evaluate(candidates, UNTRAINED)[0].infeasible is None


def test_the_dense_model_is_measured_as_it_is_and_work_is_counted(make, candidates):
    evaluator = make()
    dense = evaluator.space.baselines()["dense"].text
    one, other = evaluator.evaluate([dense, candidates[0]], LONG)
    assert one.values["kl"] < 1e-5
    assert (one.n_tokens, one.fidelity) == (96, LONG)
    assert other.n_tokens == 96 + 128
    (again,) = evaluator.evaluate(candidates[:1], LONG)
    assert (again.n_tokens, again.values) == (0, other.values)


def test_own_modules_share_weights_and_nothing_else():
    anatomy = small_anatomy()
    mine = own_modules(anatomy)
    ours, theirs = dict(anatomy.model.named_parameters()), dict(mine.model.named_parameters())
    assert {name: p.data_ptr() for name, p in ours.items()} == {n: p.data_ptr() for n, p in theirs.items()}
    assert all(theirs[name] is not p for name, p in ours.items())
    assert not set(anatomy.model.modules()) & set(mine.model.modules())
    inside = set(mine.model.modules())
    assert {mine.head, mine.embedding, *mine.tail, *(x.module for x in mine.linears)} <= inside
    tokens = random_tokens(1, 8)
    assert torch.equal(mine.model(tokens).logits, anatomy.model(tokens).logits)


# --- settings, budget, searches ---

TRAINING = {"tokens": [0, 128], "learning_rate": 1e-3}
EVALUATOR = {
    "window": 64,
    "calibration_tokens": 512,
    "fidelities": [128, 256],
    "test_tokens": 256,
    "training": TRAINING,
}
SETTINGS = {
    "space": {"kind": "architecture", "target": 0.3},
    "controller": {"kind": "evolution", "offspring": 4},
    "evaluator": EVALUATOR,
    "objectives": ["loss"],
    "budget": {"evaluations": 9},
}


def test_fidelities_carry_their_training():
    of = settings_from(SETTINGS).evaluator
    texts = [f.text for f in (*of.search_fidelities, of.compared, of.test_fidelity)]
    assert texts == ["search:128", "search:256+trained:128", "search:256+trained:128", "test:256+trained:128"]
    assert app.plan(settings_from(SETTINGS)).fidelities == (*of.search_fidelities, of.test_fidelity)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"tokens": [0, 0]}, "a number above 0, got [0, 0]"),
        ({"tokens": [64]}, "`evaluator.training.tokens` for each of the 2 `evaluator.fidelities`, got [64]"),
        ({"tokens": [128, 64]}, "to ascend"),
        ({"tokens": [0, 100]}, "Use 128"),
        ({"tokens": [0, 128], "learn": "bias"}, "`evaluator.training.learn`"),
        ({"tokens": [0, 128], "learning_rate": 0}, "`evaluator.training.learning_rate`"),
        ({"tokens": [0, 128], "rate": 1}, "'rate'"),
        ({}, "`evaluator.training.tokens`, got nothing"),
    ],
)
def test_wrong_training_is_named(training, said):
    with pytest.raises(UsageError) as error:
        settings_from({**SETTINGS, "evaluator": {**EVALUATOR, "training": training}})
    assert said in str(error.value)


def test_how_is_part_of_the_identity_and_how_long_is_not():
    def identified(**training):
        return identity(settings_from({**SETTINGS, "evaluator": {**EVALUATOR, "training": training}}))

    assert identified(**TRAINING) == identified(**{**TRAINING, "tokens": [64, 1280]})
    assert identified(**TRAINING) != identified(**{**TRAINING, "loss": "ce"})
    without = settings_from({**SETTINGS, "evaluator": {**EVALUATOR, "training": None}})
    assert "training" not in identity(without)["evaluator"]
    assert settings_from(resolved(settings_from(SETTINGS))) == settings_from(SETTINGS)


def test_a_budget_in_tokens_counts_those_that_are_trained_on():
    ledger = Ledger(Budget(tokens=300))
    rng, fidelity = np.random.default_rng(0), Fidelity("search", 64, 128)
    proposals = [Proposal(SPACE.sample(rng, 0), fidelity) for _ in range(2)]
    assert ledger.affordable(proposals) == proposals[:1]
    ledger.add(proposals[:1])
    measured = Measurement(proposals[0].candidate.text, fidelity, {"loss": 1.0}, n_tokens=192)
    ledger.tell([Trial(0, measured)])
    assert ledger.spent.tokens == 192
    assert not ledger.affordable(proposals[1:])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_same_trials_in_one_and_in_two_workers(tmp_path, ray_cluster, one_thread):
    found = {}
    for name, executor in {
        "local": {"kind": "local", "threads": 1},
        "two": {"kind": "ray", "deterministic": True, "workers": 2},
    }.items():
        settings = settings_from({**SETTINGS, "executor": executor})
        app.search(settings, tmp_path / name, levels=tmp_path / "levels")
        found[name] = sorted(lines(tmp_path / name), key=lambda x: (x["candidate"], x["fidelity"]))
    assert found["local"] == found["two"]
    run = app.open_run(tmp_path / "two")
    assert {t.measurement.fidelity.text for t in run.trials()} == {"search:256+trained:128"}
    best = run.front()[0]
    assert run.test_of(best).fidelity.text == "test:256+trained:128"
