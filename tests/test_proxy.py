"""Foretelling losses without a forward pass: what the closed form is, what it costs, where it is answered."""

from __future__ import annotations

import pickle

import pytest
import torch
from scipy.stats import spearmanr

from secateur.evaluators.session import Session
from secateur.evaluators.worker_setup import worker_setup
from secateur.pruners.calibration.fisher import output_moments
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.masks import mask
from secateur.pruners.stores.block_files import LevelStoreError
from secateur.pruners.weights.formula_proxy import (
    FormulaProxy,
    grams_of,
    relative_output_error,
    squared_output,
)
from secateur.pruners.weights.formula_store import (
    Grams,
    TerminalStore,
    build_terminals,
    is_built,
    load_outputs,
)
from secateur.search.app.session import plan
from secateur.search.settings.settings import resolved, settings_from
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.measurement import Fidelity
from tests.models import random_tokens, small_anatomy

EVALUATOR = {"window": 64, "calibration_tokens": 1024, "fidelities": [128, 1024], "test_tokens": 128}
SPACE = {"kind": "formula", "target": 0.5, "terminals": ["W", "X"], "known": ["wanda", "magnitude"]}
ALL = 1 << 20


def settings(**space):
    return settings_from(
        {"space": {**SPACE, **space}, "evaluator": EVALUATOR, "objectives": ["loss", "nodes"]}
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    made = Session(plan(settings(proxy={"blocks": 100})))
    made.directory = tmp_path_factory.mktemp("store") / "levels"
    made.build_levels(made.directory)
    return made


def layers_of(session):
    pruner = session.cases["main"].pruner()
    pruner.open(session.directory)
    return pruner.layers


def proxy_of(session, rows=ALL, kind="full", comparison="output", group_size=None):
    layers = layers_of(session)
    layers.comparison, layers.group_size = comparison, group_size
    return FormulaProxy(layers, Grams(tuple(range(len(session.anatomy.blocks))), kind), rows)


def config(session, text):
    return session.space.config(session.space.parse(text))


# --- the closed form --------------------------------------------------------------------------------------------------


def test_it_is_the_error_of_the_outputs_on_the_calibration_tokens():
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(200, 8)
    kept = mask(weight.abs(), 0.5)
    gram = inputs.T @ inputs / len(inputs)
    outputs, error = inputs @ weight.T, inputs @ (weight * ~kept).T
    assert squared_output(weight, gram) == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-4)
    found = relative_output_error(weight, kept, gram, squared_output(weight, gram))
    assert found == pytest.approx(float(error.norm() / outputs.norm()), rel=1e-4)


def test_the_diagonal_is_a_gram_matrix_of_uncorrelated_inputs():
    torch.manual_seed(0)
    weight, diagonal = torch.randn(6, 8), torch.rand(8)
    assert squared_output(weight, diagonal) == pytest.approx(
        squared_output(weight, diagonal.diag()), rel=1e-5
    )
    assert relative_output_error(weight, weight > 9, diagonal, 0.0) == 0.0


def test_among_masks_of_rows_none_has_a_smaller_diagonal_error_than_wandas():
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 16), torch.rand(16) + 0.1
    wanda = mask(weight.abs() * inputs, 0.5)
    whole = squared_output(weight, inputs.square())
    best = relative_output_error(weight, wanda, inputs.square(), whole)
    others = [mask(torch.rand(8, 16), 0.5) for _ in range(50)] + [mask(weight.abs(), 0.5)]
    assert all(relative_output_error(weight, kept, inputs.square(), whole) > best for kept in others)


# --- the stored second moments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_second_moments_are_kept_for_chosen_blocks_in_the_same_pass(kind, tmp_path):
    anatomy, tokens, grams = small_anatomy(n_layers=3), random_tokens(4, 16), Grams((0, 2), kind)
    build_terminals(tmp_path, anatomy, tokens, ["W", "X"], "model and data", grams=grams)
    found = TerminalStore(tmp_path, anatomy, ["X"]).grams(grams)
    expected = {
        name: (of.gram if kind == "full" else of.sum_squares) / of.n_tokens
        for part in stream_blocks(anatomy, tokens, inputs="gram")
        for name, of in part.inputs.items()
        if part.block.index != 1
    }
    assert set(found) == set(expected)
    for name, gram in expected.items():
        torch.testing.assert_close(found[name], gram)
    q, k = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert found[q].data_ptr() == found[k].data_ptr()  # one input, kept once


def test_a_store_without_the_second_moments_is_built_again(tmp_path):
    anatomy, tokens = small_anatomy(), random_tokens(4, 16)
    build_terminals(tmp_path, anatomy, tokens, ["W", "X"], "one")
    assert is_built(tmp_path, ["W"], "one")
    assert not is_built(tmp_path, ["W"], "one", Grams((0,)))
    build_terminals(tmp_path, anatomy, tokens, ["W", "X"], "one", grams=Grams((0,)))
    assert is_built(tmp_path, ["W"], "one", Grams((0,)))
    assert not is_built(tmp_path, ["W"], "other", Grams((0,)))
    assert not is_built(tmp_path, ["W"], "one", Grams((0, 1)))
    assert not is_built(tmp_path, ["W"], "one", Grams((0,), "diagonal"))


def test_blocks_are_evenly_spread():
    of = settings(proxy={"blocks": 3, "gram": "diagonal"}).space
    assert grams_of(of, 9) == Grams((0, 4, 8), "diagonal")
    assert grams_of(of, 2) == Grams((0, 1), "diagonal")
    assert grams_of(settings(proxy=None).space, 9) is None


# --- of formulas ------------------------------------------------------------------------------------------------------


def test_with_all_rows_and_blocks_it_is_the_mean_over_projections(session):
    text, errors = "abs(W) * X", []
    layers = layers_of(session)
    grams = layers.store.grams(Grams(tuple(range(len(session.anatomy.blocks)))))
    for block in session.anatomy.blocks:
        masks = layers.masks(block.index, formula_of(f"formula: {text}"), config(session, text)["sparsity"])
        for linear in block.linears:
            gram, weight = grams[linear.name], linear.weight.float()
            errors.append(
                relative_output_error(weight, masks[linear.name], gram, squared_output(weight, gram))
            )
    assert proxy_of(session).loss(config(session, text)) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize(("comparison", "group_size"), [("output", None), ("layer", None), ("output", 4)])
def test_some_rows_foretell_what_all_rows_give(session, comparison, group_size):
    how = {"comparison": comparison, "group_size": group_size}
    texts = ["abs(W) * X", "abs(W)", "abs(W) * X * X", "abs(W) / X"]
    few, every = (
        [proxy_of(session, rows, **how).loss(config(session, text)) for text in texts] for rows in (16, ALL)
    )
    assert few == pytest.approx(every, rel=0.1)
    assert spearmanr(few, every).statistic > 0.99


def test_where_rows_of_a_layer_compete_the_chosen_ones_lose_what_the_whole_layer_takes_from_them(session):
    linear = next(session.anatomy.linears)
    proxy = proxy_of(session, rows=8, comparison="layer")
    sample = next(x for x in proxy.samples if x.name == linear.name)
    kept = proxy._layers.mask(formula_of("formula: abs(W)"), sample.terminals, 0.5, linear.name)
    assert kept.shape == linear.weight.shape
    assert torch.equal(sample.weight, linear.weight[sample.rows].float())
    torch.testing.assert_close(kept, mask(linear.weight.abs(), 0.5, comparison="layer"))


def test_formulas_that_prune_alike_have_one_loss_and_undefined_ones_a_reason(session):
    evaluator, fidelity = session.evaluator(session.directory), session.plan.proxy
    texts = ["abs(W) * X", "square(W * X)", "dense", "log(W)", "X"]
    found = evaluator.evaluate(texts, fidelity)
    assert [m.candidate for m in found] == texts
    assert found[0].values["loss"] == found[1].values["loss"] > 0
    assert found[2].values["loss"] == 0
    assert [m.infeasible is None for m in found] == [True, True, True, False, False]
    assert all(m.n_tokens == 0 and m.fidelity == fidelity and m.blocks == 0 for m in found)
    assert found[0].values["nodes"] == 4


def test_it_orders_formulas_as_data_does(session):
    texts = ["abs(W) * X", "abs(W)", "abs(W) / X", "abs(W) * X * X", "abs(W) * square(X) * X", "neg(abs(W))"]
    texts = [session.space.parse(text).text for text in texts]
    evaluator = session.evaluator(session.directory)
    foretold, measured = (
        [m.values["loss"] for m in evaluator.evaluate(texts, fidelity)]
        for fidelity in (session.plan.proxy, Fidelity("search", 1024))
    )
    assert spearmanr(foretold, measured).statistic > 0.8


# --- where it is answered ---------------------------------------------------------------------------------------------


def test_a_plan_names_its_proxy_where_the_space_has_one(session):
    assert session.plan.proxy == Fidelity("proxy", 1024)
    assert plan(settings(proxy=None)).proxy is None
    assert plan(settings_from({})).proxy is None


def test_a_worker_foretells_what_the_driver_does(session, tmp_path):
    setup = worker_setup(
        session, tmp_path / "kit", session.directory, threads=torch.get_num_threads(), spread=False
    )
    worker = pickle.loads(pickle.dumps(setup))(setup.directories)
    texts = ["abs(W) * X", "abs(W)"]
    for fidelity in (session.plan.proxy, Fidelity("search", 128)):
        here, there = (
            [m.values["loss"] for m in evaluator.evaluate(texts, fidelity)]
            for evaluator in (session.evaluator(session.directory), worker)
        )
        assert there == pytest.approx(here, rel=1e-5)


def test_a_directory_without_second_moments_is_refused(session, tmp_path):
    empty = tmp_path / "levels"
    identity = layers_of(session).store.identity
    tokens = session.pruner.calibration.tokens
    build_terminals(empty, session.anatomy, tokens, session.space.terminals, identity)
    with pytest.raises(LevelStoreError, match="Expected second moments"):
        session.evaluator(empty).evaluate(["abs(W)"], session.plan.proxy)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [({"blocks": 0}, "blocks"), ({"rows": 1}, "rows"), ({"gram": "half"}, "gram"), ({"rank": 3}, "rank")],
)
def test_settings_are_checked(proxy, message):
    with pytest.raises(ValueError, match=message):
        settings(proxy=proxy)


# --- by the curvature -------------------------------------------------------------------------------------------------


def test_by_the_curvature_it_is_the_second_order_form_of_the_masks_and_needs_a_pass_of_its_own(tmp_path):
    made = Session(plan(settings(proxy={"blocks": 2, "rows": ALL, "by": "curvature"})))
    made.build_levels(tmp_path / "levels")
    pruner = made.cases["main"].pruner()
    pruner.open(tmp_path / "levels")
    wanda = config(made, "abs(W) * X")
    masks = {}
    for block in (0, len(made.anatomy.blocks) - 1):
        masks |= pruner.layers.masks(block, formula_of(wanda["metric"]), wanda["sparsity"])
    moments = output_moments(made.anatomy, pruner.calibration.tokens, [*masks])
    grams = pruner.layers.store.grams(Grams((0, len(made.anatomy.blocks) - 1)))
    wanted = 0.0
    for linear in made.anatomy.linears:
        if linear.name in masks:
            gone = linear.weight.double() * ~masks[linear.name]
            b, g = moments[linear.name].double(), grams[linear.name].double()
            wanted += float(torch.trace(b @ gone @ g @ gone.T)) / 2
    assert pruner.proxy_loss(wanda) == pytest.approx(wanted, rel=1e-4)
    (tmp_path / "levels" / "outputs.safetensors").unlink()
    with pytest.raises(LevelStoreError, match="second moments of gradients"):
        load_outputs(tmp_path / "levels", Grams((0,)))


def test_studies_from_before_have_the_same_proxy():
    usual = {"blocks": 8, "rows": 32, "gram": "full"}
    assert resolved(settings())["space"]["proxy"] == usual
    assert resolved(settings(proxy={"by": "curvature"}))["space"]["proxy"] == usual | {"by": "curvature"}
