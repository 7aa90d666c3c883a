"""What recipes come to on a small model: every known one becomes weights, by reference, that cost what it says."""

from __future__ import annotations

import gc
import sys
import weakref
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from secateur.pruners.calibration import collected as calibration_statistics
from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.pool import build_pools
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.narrow import narrowed
from secateur.pruners.models.shape import model_shape
from secateur.pruners.pruner import DenseModel, InfeasibleError
from secateur.pruners.recipes.context import N_SAMPLES, RecipeContext
from secateur.pruners.recipes.plan import DENSE
from secateur.pruners.recipes.pruner import RecipePruner
from secateur.pruners.recipes.weight_pruning import spread_step
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.spaces.method import MethodRow
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.models import count_zeros, random_tokens, small_llama
from tests.structures import take_few_passes

CALIBRATION = {"sources": {"calibration": 1}, "samples": 4, "length": 32}
TOKENS = random_tokens(2, 16, seed=7)


def config(unit, sparsity=0.3, **changes):
    return completed({"unit": unit, "sparsity": sparsity, "calibration": CALIBRATION, **changes})


def known(name, sparsity=0.3):
    return config(KNOWN[name].unit, sparsity, **KNOWN[name].form)


def switcher_of(basis: RecipeContext, unit: str) -> RecipePruner:
    pruner = RecipePruner(SimpleNamespace(unit=unit), DenseModel(basis.anatomy, "toy", basis.shape))
    pruner.use(basis)
    return pruner


class Case:
    """A random model of four blocks, dense between tests, with a switcher of each unit."""

    def __init__(self, directory: Path) -> None:
        self.model = small_llama(n_layers=4)
        self.anatomy = dissect(self.model)
        self.shape = model_shape(self.anatomy, 8, 4)
        texts = {
            "calibration": random_tokens(1, 512, seed=5)[0],
            "contrast": random_tokens(1, 512, seed=6)[0],
        }
        pools = build_pools(self.anatomy, texts, look=True)
        cache = StatisticsCache(directory, sys.maxsize)
        self.basis = RecipeContext(self.anatomy, "toy", pools, cache, self.shape, seed=0, dampening=0.01)
        self.switchers = {unit: switcher_of(self.basis, unit) for unit in ("weights", "structure", "blocks")}
        self.dense = self.logits()
        self.pointers = self.state()

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(TOKENS, use_cache=False).logits

    def state(self):
        return {name: (p.data_ptr(), p.shape) for name, p in self.model.named_parameters()}

    def switched(self, wanted):
        """Logits of the model that a recipe makes, number of parameters, zeros; the model is dense afterwards."""
        switcher = self.switchers[wanted["unit"]]
        try:
            for block, key in enumerate(switcher.keys(wanted)):
                switcher.apply(block, key)
            switcher.finish(switcher.keys(wanted)[-1])
            stored, plan = dict(self.model.named_parameters()), switcher.plan(wanted)
            if plan.narrow is not None:  # whole in the live model
                with narrowed(self.anatomy, plan.narrow):
                    stored = {name: x.detach() for name, x in self.model.named_parameters()}
            n_params = sum(p.numel() for p in stored.values())
            return self.logits(), n_params, sum(count_zeros(self.anatomy).values())
        finally:
            switcher.restore()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("statistics"))


@pytest.mark.parametrize("name", [name for name, row in KNOWN.items() if row.unit != "experts"])
def test_every_known_recipe_becomes_weights_that_cost_what_it_says(case, monkeypatch, name):
    take_few_passes(monkeypatch)
    wanted = known(name)
    logits, n_params, n_zeros = case.switched(wanted)
    costs = case.switchers[wanted["unit"]].plan(wanted).costs
    assert not torch.equal(logits, case.dense)
    assert costs["params"] == n_params - n_zeros
    assert costs["sparsity"] == pytest.approx(0.3, abs=0.06)  # a block is a quarter
    assert torch.equal(case.logits(), case.dense)
    assert case.state() == case.pointers  # the same tensors, and no parameter more


@pytest.mark.parametrize(
    ("unit", "repair"),
    [
        *product(["weights"], ["bias", "obs", "admm"]),
        *product(["structure"], ["bias", "refit", "liar", "admm", "kprune"]),
    ],
)
def test_repairs_change_weights_and_keys_but_not_what_goes(case, unit, repair):
    plain, repaired = config(unit), config(unit, repair=repair)
    switcher = case.switchers[unit]
    one, other = switcher.plan(plain), switcher.plan(repaired)
    assert one.kept == other.kept
    assert one.sparsity == other.sparsity
    assert all(a != b for a, b in zip(one.keys, other.keys, strict=True))
    (logits, n_params, n_zeros), (_, n_plain, _) = case.switched(repaired), case.switched(plain)
    assert not torch.equal(logits, case.switched(plain)[0])
    n_biases = {"bias": True, "liar": True}.get(repair, False)
    assert (n_params > n_plain) == n_biases
    assert other.costs["params"] == n_params - n_zeros
    assert case.state() == case.pointers


def test_wanda_is_what_the_space_of_allocations_does(case, tmp_path):
    wanted = known("wanda", 0.5)
    tokens = case.basis.sample(wanted["calibration"]).tokens
    reference = small_llama(n_layers=4)
    linears = {linear.name: 0.5 for linear in case.anatomy.linears}
    prune(dissect(reference), linears, Method("wanda"), tokens, sequential=False)
    with torch.no_grad():
        expected = reference(TOKENS, use_cache=False).logits
    assert torch.equal(case.switched(wanted)[0], expected)


def test_admm_is_wandas_mask_and_a_repair(case):
    reconstruction = case.switched(config("weights", 0.5, metric="admm"))
    recipe = case.switched(known("admm", 0.5))
    assert not torch.equal(recipe[0], case.switched(known("wanda", 0.5))[0])
    assert torch.allclose(recipe[0], reconstruction[0], atol=1e-6)
    assert recipe[1:] == reconstruction[1:]


def test_wandas_formula_cuts_as_wanda_for_structures_does(case):
    switcher = case.switchers["structure"]
    formula = switcher.plan(config("structure", metric="formula: abs(W) * X"))
    wanda, other = switcher.plan(config("structure")), switcher.plan(config("structure", metric="flap"))
    assert formula.units == wanda.units != other.units
    for text in ("abs(G) * H * abs(W)", "abs(W) + P", "abs(W) / R * C"):
        found = case.switched(config("structure", metric=f"formula: {text}", allocation="global"))
        assert not torch.equal(found[0], case.dense)


def test_a_second_metric_on_the_same_windows_collects_nothing(case, monkeypatch, tmp_path):
    passes = []
    for name in ("walk_dense", "collect_gradients"):
        real = getattr(calibration_statistics, name)
        counted = lambda *a, name=name, real=real, **k: (passes.append(name), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(calibration_statistics, name, counted)
    basis = RecipeContext(
        case.anatomy,
        "toy",
        case.basis.pools,
        StatisticsCache(tmp_path, sys.maxsize),
        case.shape,
        seed=0,
        dampening=0.01,
    )
    switcher = switcher_of(basis, "structure")
    blend = {"name": "blend", "order": "mixed", "magnitude": 0.5, "activation": 1}
    switcher.keys(config("structure", metric=blend))
    assert sorted(passes) == ["collect_gradients", "walk_dense"]
    for metric in ({**blend, "angle": 0.1}, {**blend, "norm": 2}, "wanda_sp", "llm_pruner_first", "taylor"):
        switcher.keys(config("structure", metric=metric))
    switcher.keys(config("structure", allocation="flap", repair="bias"))
    assert len(passes) == 2
    other = switcher_of(
        RecipeContext(
            case.anatomy, "toy", case.basis.pools, StatisticsCache(tmp_path, sys.maxsize), case.shape, 0, 0.01
        ),
        "structure",
    )
    other.keys(config("structure", metric=blend))  # another process, for all that it knows
    assert len(passes) == 2
    switcher.keys(config("structure", metric=blend, calibration={**CALIBRATION, "subset": 1}))
    assert len(passes) == 4


def test_a_rule_measures_once_for_the_parameters_that_its_measure_takes(tmp_path, monkeypatch):
    case = Case(tmp_path)
    measured, real = [], MethodRow.measure.fget

    def counted(row):
        def measure(anatomy, sample, *, centre):
            measured.append(centre)
            return real(row)(anatomy, sample, centre=centre)

        return measure

    monkeypatch.setattr(MethodRow, "measure", property(counted))
    switcher = switcher_of(case.basis, "weights")
    for change in ({}, {"alpha": 0.05}, {"centre": "mean"}, {"alpha": 0.2}):
        switcher.keys(config("weights", allocation={"rule": "dlp", **change}))
    assert measured == ["median", "mean"]


def test_equal_masks_have_equal_keys_whatever_they_come_from(case):
    switcher = case.switchers["weights"]
    magnitude = known("magnitude")
    blend = {"name": "blend", "magnitude": 2, "activation": 0, "comparison": "layer"}
    assert switcher.keys(magnitude) == switcher.keys(config("weights", metric=blend))
    assert switcher.keys(magnitude) != switcher.keys(known("wanda"))


def test_what_is_protected_stays_dense(case, tmp_path):
    basis = RecipeContext(
        case.anatomy,
        "toy",
        case.basis.pools,
        case.basis.cache,
        case.shape,
        seed=0,
        dampening=0.01,
        protect=["model.layers.1.*"],
    )
    for unit in ("weights", "structure", "blocks"):
        keys = switcher_of(basis, unit).keys(config(unit))
        assert keys[1] == DENSE
        assert any(key != DENSE for key in keys)


def test_what_cannot_be_is_infeasible_with_its_reason(case):
    with pytest.raises(InfeasibleError, match="at least 64 windows of 32"):
        case.switchers["weights"].keys(config("weights", calibration={**CALIBRATION, "samples": 64}))
    with pytest.raises(InfeasibleError, match="sparsity"):
        case.switchers["structure"].keys(config("structure", 0.9, allocation="cfsp"))
    with pytest.raises(InfeasibleError, match="whole blocks"):
        case.switchers["blocks"].keys(config("blocks", 0.05))
    assert torch.equal(case.logits(), case.dense)


def test_statistics_that_are_held_no_more_are_let_go(case):
    switcher = case.switchers["structure"]

    def texts(subset):
        return CALIBRATION | {"choose": "random", "subset": subset}

    first = weakref.ref(switcher.plan(config("structure", metric="wanda_sp", calibration=texts(0))))
    switcher.restore()
    for subset in range(1, N_SAMPLES + 2):
        switcher.keys(config("structure", metric="wanda_sp", calibration=texts(subset)))
        switcher.restore()
    gc.collect()
    assert first() is None, "its mapped files would keep their disk blocks"


def test_few_decisions_are_remembered_beside_those_under_way(case, monkeypatch):
    monkeypatch.setattr("secateur.pruners.recipes.plans.N_PLANS", 2)
    switcher = switcher_of(case.basis, "structure")
    found = [
        weakref.ref(switcher.plan(config("structure", share, metric="wanda_sp"))) for share in (0.2, 0.3)
    ]
    switcher.keys(config("structure", 0.4, metric="wanda_sp"))
    found += [
        weakref.ref(switcher.plan(config("structure", share, metric="wanda_sp"))) for share in (0.5, 0.25)
    ]
    gc.collect()
    assert [one() is None for one in found] == [True, False, False, False]
    decision = switcher.plan(config("structure", 0.4, metric="wanda_sp"))
    assert decision is switcher.plan(config("structure", 0.4, metric="wanda_sp"))
    switcher.restore()


def test_a_sample_of_scores_meets_all_columns():
    for rows, width in ((4096, 4096), (11008, 4096), (576, 1536)):
        step = spread_step(rows * width, 65536, width)
        taken = range(0, rows * width, step)
        assert len(taken) <= 65536
        assert len({index % width for index in taken}) == width
