"""Kronecker-factored curvature as a metric, an importance, and in The LLM Surgeon, against dense Fisher matrices."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.calibration.fisher import OUTPUT_DAMPENING, output_costs, output_moments
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.kfac import kfac as kfac_of_units
from secateur.pruners.structure.kfac import kfac_obs
from secateur.pruners.weights import llm_surgeon as module
from secateur.pruners.weights.kfac import kfac
from secateur.pruners.weights.llm_surgeon import llm_surgeon, updated
from secateur.spaces.levels import n_zeros
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy, small_llama

TOKENS = random_tokens(4, 16)
N_OUT, N_IN = 4, 6


def positive(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / len(rows)


@pytest.fixture(scope="module")
def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, B and A, of a small layer."""
    weight = torch.randn(N_OUT, N_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return weight, positive(N_OUT, 0), positive(N_IN, 1)


def dense_surgery(weight, b, a, gone):
    """Least ``d^T F d / 2`` with ``w + d`` zero where gone, by the dense F and its Lagrange conditions."""
    fisher, n = torch.kron(b, a), weight.numel()
    at = gone.flatten().nonzero()[:, 0]
    select = torch.eye(n, dtype=torch.float64)[at]
    corner = torch.zeros(len(at), len(at), dtype=torch.float64)
    system = torch.cat([torch.cat([fisher, select.T], 1), torch.cat([select, corner], 1)])
    right = torch.cat([torch.zeros(n, dtype=torch.float64), -weight.flatten()[at]])
    change = torch.linalg.solve(system, right)[:n]
    return weight + change.view_as(weight), float(change @ fisher @ change / 2)


def test_a_score_is_the_loss_of_pruning_that_weight_with_the_best_update_of_the_others(factors) -> None:
    weight, b, a = factors
    inputs = InputStatistics(1, a.diagonal().float(), a.float())
    costs = 1 / (b + OUTPUT_DAMPENING * b.diagonal().mean() * torch.eye(N_OUT)).inverse().diagonal()
    found = kfac(
        weight.float(), inputs, torch.Generator(), gradients={"fisher": costs.float()}, dampening=0.01
    )
    damp_b, damp_a = (
        x + rate * x.diagonal().mean() * torch.eye(len(x)) for x, rate in ((b, OUTPUT_DAMPENING), (a, 0.01))
    )
    for i in range(N_OUT):
        for j in range(N_IN):
            gone = torch.zeros(N_OUT, N_IN, dtype=torch.bool)
            gone[i, j] = True
            _, loss = dense_surgery(weight, damp_b, damp_a, gone)
            assert float(found[i, j]) == pytest.approx(loss, rel=1e-3)


def test_an_update_is_that_of_the_dense_fisher_matrix_and_never_worse_than_zeros_alone(factors) -> None:
    weight, b, a = factors
    gone = torch.rand(N_OUT, N_IN, generator=torch.Generator().manual_seed(3)) < 0.4
    wanted, loss = dense_surgery(weight, b, a, gone)
    found = updated(weight, gone, b.inverse(), a.inverse())
    torch.testing.assert_close(found, wanted)
    alone = (weight * ~gone - weight).flatten()
    assert loss < 0.95 * float(alone @ torch.kron(b, a) @ alone / 2)


def test_groups_of_rows_are_updated_one_after_the_other(factors) -> None:
    weight, b, a = factors
    gone = torch.zeros(N_OUT, N_IN, dtype=torch.bool)
    gone[0, :3] = gone[1, 2] = gone[3, 1:4] = True
    found = updated(weight, gone, b.inverse(), a.inverse(), n_correlated=4)
    first = gone.clone()
    first[2:] = False
    after, _ = dense_surgery(weight, b, a, first)
    second = gone & ~first
    wanted, _ = dense_surgery(after, b, a, second)
    torch.testing.assert_close(found, wanted.masked_fill(gone, 0.0))


def drawn_gradients(anatomy) -> dict[str, torch.Tensor]:
    """Gradients of every projection's outputs for the labels that the passes draw, token by token."""
    outputs, hooks = {}, []
    for linear in anatomy.linears:

        def keep(module_, args, output, name=linear.name):
            output.requires_grad_(True)
            outputs[name] = output

        hooks.append(linear.module.register_forward_hook(keep))
    logits = anatomy.model(input_ids=TOKENS).logits.flatten(0, 1).float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum")
    found = torch.autograd.grad(loss, [*outputs.values()])
    for hook in hooks:
        hook.remove()
    return {name: g.flatten(0, 1).double() for name, g in zip(outputs, found, strict=True)}


def test_curvature_of_outputs_is_that_of_drawn_labels() -> None:
    anatomy = dissect(small_llama())
    gradients, n = drawn_gradients(anatomy), TOKENS.numel()
    moments, alone = output_moments(anatomy, TOKENS), output_costs(anatomy, TOKENS)
    assert {*moments} == {linear.name for linear in anatomy.linears if linear.is_output}
    for name, g in gradients.items():
        b = g.T @ g / n
        if name in moments:
            torch.testing.assert_close(moments[name].double(), b, rtol=1e-3, atol=1e-7)
        dampened = b + OUTPUT_DAMPENING * b.diagonal().mean() * torch.eye(len(b))
        torch.testing.assert_close(
            alone[name].double(), 1 / dampened.inverse().diagonal(), rtol=1e-3, atol=1e-8
        )


@pytest.fixture(scope="module")
def evidence() -> list[Evidence]:
    anatomy = small_anatomy()
    gradients = {"fisher_outputs": output_moments(anatomy, TOKENS)}
    *_, last = stream_blocks(anatomy, TOKENS, outputs="gram")
    layout = find_layouts(anatomy)[1]
    return [
        Evidence(part, last.outputs[part.output.name], gradients, 1e-9 if part.kind == "mlp" else 0.01)
        for part in layout.sublayers
    ]


def test_importance_is_the_foretold_loss_of_each_unit_alone(evidence) -> None:
    for given in evidence:
        layout, found = given.layout, kfac_of_units(given)
        b = given.gradients["fisher_outputs"][layout.output.name].double()
        weight, a = given.weight.double(), given.seen.second_moment
        for unit in range(layout.n_units):
            change = torch.zeros_like(weight)
            columns = slice(unit * layout.unit_width, (unit + 1) * layout.unit_width)
            change[:, columns] = -weight[:, columns]
            wanted = float(torch.trace(b @ change @ a @ change.T) / 2)
            assert float(found[unit]) == pytest.approx(wanted, rel=1e-4)


def test_greedy_order_begins_with_the_unit_that_costs_least_with_the_best_update(evidence) -> None:
    for given in evidence:
        layout, order = given.layout, kfac_obs(given)
        b = given.gradients["fisher_outputs"][layout.output.name].double()
        moment = given.seen.second_moment
        a = moment + given.dampening * moment.diagonal().mean() * torch.eye(len(moment))
        weight, costs = given.weight.double(), []
        for unit in range(layout.n_units):
            at = torch.arange(unit * layout.unit_width, (unit + 1) * layout.unit_width)
            middle = torch.linalg.solve(a.inverse()[at][:, at], weight[:, at].T)
            costs.append(float(torch.trace(b @ weight[:, at] @ middle)))
        assert int(order.argmin()) == min(range(layout.n_units), key=costs.__getitem__)


def test_surgeon_prunes_exactly_and_better_than_its_costs_alone() -> None:
    anatomy = small_anatomy()
    before = {linear.name: linear.weight.clone() for linear in anatomy.linears}
    n = sum(linear.n_weights for linear in anatomy.linears)
    found = llm_surgeon(anatomy, TOKENS, 0.5, n_shots=4)
    assert all(torch.equal(linear.weight, before[linear.name]) for linear in anatomy.linears)
    zeros = {name: int((weight == 0).sum()) for name, weight in found.items()}
    assert sum(zeros.values()) == n_zeros(0.5, n)
    shares = {x.name: zeros.get(x.name, 0) / x.n_weights for x in anatomy.linears}
    assert len({round(share, 3) for share in shares.values()}) > 3  # one threshold, unequal shares

    def loss(weights) -> float:
        for linear in anatomy.linears:
            linear.point_to(weights.get(linear.name, before[linear.name]))
        p, q = (
            x.log_softmax(-1) for x in (small_anatomy().model(TOKENS).logits, anatomy.model(TOKENS).logits)
        )
        for linear in anatomy.linears:
            linear.point_to(before[linear.name])
        return float((p.exp() * (p - q)).sum(-1).mean())

    masked = {name: before[name] * (weight != 0) for name, weight in found.items()}
    assert loss(found) < 0.9 * loss(masked)


def test_shots_never_bring_weights_back_and_each_layer_can_have_its_own_share(monkeypatch) -> None:
    anatomy = small_anatomy()
    names = [linear.name for linear in anatomy.linears]
    masks: list[dict[str, torch.Tensor]] = []
    shoot = module._shoot

    def recorded(linears, moments, sparsity, share, gone, dampening) -> None:
        shoot(linears, moments, sparsity, share, gone, dampening)
        masks.append(dict(gone))

    monkeypatch.setattr(module, "_shoot", recorded)
    given = {names[0]: 0.25, names[5]: 0.7}
    found = llm_surgeon(anatomy, TOKENS, given, n_shots=3, protected=names[5:6])
    assert found.keys() == {names[0]}
    first, second, third = (x[names[0]] for x in masks)
    assert not (first & ~second).any()
    assert not (second & ~third).any()
    assert [int(x.sum()) for x in (first, second, third)] == [
        n_zeros(0.25 * share, found[names[0]].numel()) for share in (1 / 3, 2 / 3, 1.0)
    ]


def test_memory_is_checked_before(monkeypatch) -> None:
    monkeypatch.setattr("secateur.pruners.models.memory.available_bytes", lambda device: 1)
    with pytest.raises(ValueError, match="memory for the curvature of all projections in the LLM Surgeon"):
        llm_surgeon(small_anatomy(), TOKENS, 0.5)


def test_one_threshold_has_no_parameters_of_its_own() -> None:
    recipe = {"unit": "weights", "sparsity": 0.5, "metric": "llm_surgeon"}
    whole = completed({**recipe, "allocation": "global"})
    assert whole["allocation"] == {"rule": "global", "normalise": "none", "cost": 0}
    with pytest.raises(ValueError, match="defaults of the rule global with the metric llm_surgeon"):
        completed({**recipe, "allocation": {"rule": "global", "normalise": "mean"}})
    with pytest.raises(ValueError, match="needs no scores with the metric sparsegpt"):
        completed({**recipe, "metric": "sparsegpt", "allocation": "global"})
