"""Our controllers under somebody else's Tuner."""

import json
import math
import pickle

import pytest

pytest.importorskip("ray.tune")

from ray import tune

from secateur.search.controller import Controller, Proposal
from secateur.search.controllers.ray_tune import ControllerSearcher
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.measurement import Fidelity
from tests.toy import Bits, OneMax, toy_loss

SPACE, LARGE = OneMax(8, (4,)), Fidelity("search", 256)


class Scripted(Controller):
    """Proposes what it is given, one at a time, and keeps what it is told."""

    def __init__(self, texts):
        self.texts, self.told = list(texts), []

    def ask(self, n):
        return [Proposal(Bits(self.texts.pop(0)), LARGE)] if self.texts else []

    def tell(self, trials):
        self.told += [(t.number, t.measurement.candidate, t.measurement.infeasible) for t in trials]


class NoBaselines(OneMax):
    def baselines(self):
        return {}


def searcher_of(texts, space=None):
    return ControllerSearcher(lambda: Scripted(texts), space or NoBaselines(4, (2,)), LARGE)


def evolution():
    row = CONTROLLERS["evolution"]
    settings = row.settings(kind="evolution", offspring=4, start="random")
    return row.build(SPACE, (LARGE,), 0, settings)


def test_the_baselines_come_first_with_plain_configurations():
    searcher = searcher_of(["1010"], OneMax(4, (2,)))
    first = [searcher.suggest(f"t{i}") for i in range(3)]
    assert first[0] == {"candidate": "0000", "fidelity": "search:256"}
    assert [config["candidate"] for config in first] == ["0000", "0011", "1010"]


def test_it_waits_for_results_and_then_finishes():
    searcher = searcher_of(["1010"])
    searcher.suggest("a")
    assert searcher.suggest("b") is None
    searcher.on_trial_complete("a", {"loss": 0.5})
    assert searcher.suggest("b") == "FINISHED"


def test_results_are_told_with_exact_costs_and_failures_as_reasons():
    searcher = searcher_of(["1010", "1100", "0110", "0101", "1001"])
    for name in "abcde":
        searcher.suggest(name)
    told = []
    searcher._controller.tell = lambda trials: told.extend(t.measurement for t in trials)
    searcher.on_trial_complete("c", {"loss": 0.25, "params": -1.0, "other": "text"})
    searcher.on_trial_complete("c", {"loss": 0.75})  # again
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_complete("b", {"loss": math.nan})
    searcher.on_trial_complete("d", {"accuracy": 1.0})
    searcher.on_trial_complete("e", None)
    assert [m.candidate for m in told] == ["0110", "1010", "1100", "0101", "1001"]
    assert told[0].values == {"loss": 0.25, "params": 2.0, "sparsity": 0.5}
    assert [m.infeasible for m in told[1:]] == [
        "its trial failed",
        "its loss is not finite",
        "its trial reported no loss",
        "its trial failed",
    ]


def test_what_is_known_or_under_way_makes_no_second_trial():
    searcher = searcher_of(["1010", "1010", "0110", "1010"])
    assert searcher.suggest("a")["candidate"] == "1010"
    assert searcher.suggest("b")["candidate"] == "0110"  # the second 1010 waits for the first
    searcher.on_trial_complete("a", {"loss": 0.5})
    assert searcher._controller.told == [(0, "1010", None)] * 2
    assert searcher.suggest("c") is None
    assert searcher._controller.told == [(0, "1010", None)] * 3  # from memory


def test_a_controller_that_goes_round_in_circles_is_ended():
    searcher = searcher_of(["1010"] * 3000)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"loss": 0.5})
    assert searcher.suggest("b") == "FINISHED"


def test_a_restored_searcher_goes_on_as_the_saved_one(tmp_path):
    def go_on(searcher, names):
        configs = []
        for name in names:
            configs.append(searcher.suggest(name))
            searcher.on_trial_complete(name, {"loss": toy_loss(configs[-1]["candidate"])})
        return configs

    first = ControllerSearcher(evolution, SPACE, LARGE)
    go_on(first, "abcdefgh")
    open_ = [first.suggest("i"), first.suggest("j")]
    first.save(str(tmp_path / "state"))
    second = ControllerSearcher(evolution, SPACE, LARGE)
    second.suggest("used before")
    second.restore(str(tmp_path / "state"))
    third = pickle.loads(pickle.dumps(first))
    for searcher in (first, second, third):
        searcher.on_trial_complete("j", {"loss": toy_loss(open_[1]["candidate"])})
        searcher.on_trial_complete("i", error=True)
    assert go_on(first, "klmnop") == go_on(second, "klmnop") == go_on(third, "klmnop")
    json.loads((tmp_path / "state").read_text())  # nothing that must be unpickled


class Objective(tune.Trainable):  # a function would need a process for each trial
    def setup(self, config):
        self.text = config["candidate"]

    def reset_config(self, new_config):
        self.setup(new_config)
        return True

    def step(self):
        return {"loss": toy_loss(self.text), "done": True}

    def save_checkpoint(self, checkpoint_dir):
        return None


def test_a_tuner_is_driven_to_the_end(ray_cluster, tmp_path):
    searcher = ControllerSearcher(evolution, SPACE, LARGE)
    tuner = tune.Tuner(
        tune.with_resources(Objective, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher, num_samples=10, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="toy", verbose=0),
    )
    results = tuner.fit()
    assert len(results) == 10
    assert not results.errors
    losses = {r.config["candidate"]: r.metrics["loss"] for r in results}
    assert losses == {text: toy_loss(text) for text in losses}
    assert set(list(losses)[:2]) == {"00000000", "00001111"}  # the baselines
    assert len(losses) == 10  # nothing twice
