"""Screening of recipes, and of any candidates of `evolution`, by a proxy for their loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.evaluators.session import Session
from secateur.pruners.calibration.fisher import walk_back
from secateur.pruners.learned.training import MaskTrainer
from secateur.search.app.session import plan
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity, Measurement
from tests.landscapes import FIDELITIES, Landscape, space_of
from tests.test_guided import searched

PROXY = Fidelity("proxy", 2048)
EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 512], "test_tokens": 128}
SPACE = {
    "kind": "recipe",
    "unit": "weights",
    "target": 0.5,
    "choose": ["random"],
    "length": [64],
    "samples": [8],
}


def settings(**space):
    return settings_from({"space": {**SPACE, **space}, "evaluator": EVALUATOR})


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruner(tmp_path_factory):
    session = Session(plan(settings(proxy={"blocks": 2})))
    directory = tmp_path_factory.mktemp("store") / "levels"
    session.build_levels(directory)
    found = session.cases["main"].pruner()
    found.open(directory)
    return found


def test_the_proxy_is_the_second_order_form_of_some_blocks_for_all(pruner):
    config = pruner.space.config(pruner.space.baselines()["sparsegpt@0.5"])
    n, tokens = len(pruner.anatomy.blocks), pruner.calibration.tokens
    some = [pruner.anatomy.blocks[index] for index in (0, n - 1)]
    dense = {linear.name: linear.weight for block in some for linear in block.linears}
    calls, drawn = {}, torch.Generator().manual_seed(pruner.seed)

    def keep(linear, inputs, gradients):
        calls.setdefault(linear.name, []).append((inputs.double(), gradients.double()))

    for _ in walk_back(pruner.anatomy, tokens, keep, watched=dense, drawn=drawn):
        pass
    keys, wanted = pruner.keys(config), 0.0
    for block in some:
        pruner.apply(block.index, keys[block.index])
        for linear in block.linears:
            gone = (dense[linear.name] - linear.weight).double()
            assert gone.any()
            for x, g in calls[linear.name]:
                wanted += float(torch.einsum("to,oi,ti->t", g, gone, x).square().sum()) / tokens.numel() / 2
    pruner.restore()
    assert pruner.proxy_loss(config) == pytest.approx(wanted * n / 2, rel=1e-3)
    here = {linear.name: linear.weight for block in some for linear in block.linears}
    assert all(here[name].data_ptr() == weight.data_ptr() for name, weight in dense.items())


def test_the_proxy_of_the_dense_model_is_zero_and_more_zeros_cost_more(pruner):
    dense, magnitude = (pruner.space.baselines()[name] for name in ("dense", "magnitude@0.5"))
    assert pruner.proxy_loss(pruner.space.config(dense)) == 0
    losses = [pruner.proxy_loss({**pruner.space.config(magnitude), "sparsity": x}) for x in (0.2, 0.5, 0.8)]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_a_recipe_that_trains_is_foretold_from_its_untrained_form(pruner, monkeypatch):
    plain = pruner.space.config(pruner.space.baselines()["magnitude@0.5"])
    assert settings(start="gradual", proxy={}).space.has_proxy
    rounds = {"steps": 3, "shape": "cubic"}
    training = {"before": 64, "retrain": 256, "after": 64, "loss": "kl", "lr": 0.01}
    monkeypatch.setattr(MaskTrainer, "run", None)
    found = pruner.proxy_loss({**plain, "schedule": {**rounds, **training}})
    assert found == pruner.proxy_loss({**plain, "schedule": rounds}) > 0
    assert pruner.proxy_loss({**plain, "schedule": training}) == pruner.proxy_loss(plain)
    with pytest.raises(TypeError):
        pruner.plan({**plain, "schedule": training})


def test_units_that_are_cut_have_no_proxy():
    with pytest.raises(ValueError, match=r"Expected `space\.proxy` with the unit weights, got structure"):
        settings(unit="structure", proxy={})


def test_a_search_screens_recipes_and_counts_no_tokens_for_it(tmp_path):
    from secateur.search import app
    from secateur.search.results.run import open_run

    of = settings_from(
        {
            "space": {**SPACE, "proxy": {"blocks": 2}, "metrics": ["wanda", "magnitude"], "known": []},
            "evaluator": EVALUATOR,
            "controller": {"kind": "evolution", "offspring": 2, "screening": {"oversampling": 3}},
            "executor": {"kind": "local", "threads": 1},
            "budget": {"tokens": 1600},
        }
    )
    app.search_in_lines(of, tmp_path / "run")
    study = open_run(tmp_path / "run").study
    by_proxy = [t.measurement for t in study.trials if t.measurement.fidelity.part == "proxy"]
    first = {
        t.measurement.candidate for t in study.trials if t.measurement.fidelity == Fidelity("search", 128)
    }
    assert len(by_proxy) >= 6
    assert first <= {m.candidate for m in by_proxy}
    assert len(first) < len(by_proxy)
    assert all(m.n_tokens == 0 for m in by_proxy)
    bare = of.model_copy(update={"space": of.space.model_copy(update={"proxy": None})})
    with pytest.raises(UsageError, match="Expected a space with a proxy"):
        app.search_in_lines(bare, tmp_path / "bare")


# --- evolution --------------------------------------------------------------------------------------------------------


class Foretold(Landscape):
    """The landscape with a proxy: the exact loss, or noise."""

    right = True

    def measure(self, candidate, fidelity) -> Measurement:
        if fidelity.part != "proxy":
            return super().measure(candidate, fidelity)
        noise = np.random.default_rng(np.array(candidate.levels)).random()
        return Measurement(candidate.text, fidelity, {"loss": self.exact(candidate) if self.right else noise})


class Misled(Foretold):
    right = False


def evolution(landscape, **screening) -> Evolution:
    of = EvolutionSettings(offspring=8, screening=screening or None)
    return Evolution(landscape.space, FIDELITIES, 0, of, proxy=PROXY)


def test_a_good_proxy_finds_more_for_equal_tokens():
    ratios = []
    for seed in range(5):
        landscape = Foretold(space_of(21), seed)
        plain, screened = evolution(landscape), evolution(landscape, oversampling=8)
        for controller in (plain, screened):
            searched(landscape, controller)
        ratios.append(landscape.exact(screened.elites[0][0]) / landscape.exact(plain.elites[0][0]))
        assert screened.notes["oversampling"] > 5
        assert screened.notes["rank_correlation"] > 0.5
    assert np.median(ratios) < 0.8


def test_a_proxy_of_noise_is_used_less():
    landscape = Misled(space_of(21), 0)
    controller = evolution(landscape, oversampling=8)
    searched(landscape, controller)
    assert controller.notes["oversampling"] < 3


def test_candidates_that_the_proxy_finds_infeasible_end_the_search_at_last():
    class Nothing(Foretold):
        def measure(self, candidate, fidelity) -> Measurement:
            if fidelity.part == "proxy":
                return Measurement(candidate.text, fidelity, {}, "no weights")
            return super().measure(candidate, fidelity)

    landscape = Nothing(space_of(21), 0)
    done = searched(landscape, evolution(landscape, oversampling=2), n_tokens=10**9)
    assert {proposal.fidelity.part for proposal in done[2:]} == {"proxy"}
    assert len(done) < 1000
