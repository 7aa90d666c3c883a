"""Structured optimal brain surgery and least squares, against slow references."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.linalg import dampened
from secateur.pruners.structure import obs as obs_module
from secateur.pruners.structure.flap import mean_bias
from secateur.pruners.structure.liar import interpolated
from secateur.pruners.structure.obs import obs_order, obs_update
from secateur.pruners.structure.refit import RepairInputs, alternating, least_squares
from secateur.pruners.weights.admm import Fit

DAMP = 0.01


def problem(n_out=12, n_in=24, n_tokens=200, seed=0):
    """Inputs that are far from independent, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator, dtype=torch.float64)
    x = torch.randn(n_tokens, n_in, generator=generator, dtype=torch.float64) @ mix + 0.5
    return x, torch.randn(n_out, n_in, generator=generator)


def moment_of(x):
    return x.T @ x / len(x)


def slow_obs(weight, moment, width):
    """Greedy removal as in ZipLM's algorithm 1, one unit at a time on full matrices: order, and weights after each."""
    w = weight.double().clone()
    inverse = torch.linalg.inv(dampened(moment, DAMP))
    left, order, weights = list(range(w.shape[1] // width)), [], []
    while left:
        costs = []
        for unit in left:
            s = slice(unit * width, (unit + 1) * width)
            costs.append(torch.trace(w[:, s] @ torch.linalg.inv(inverse[s, s]) @ w[:, s].T))
        unit = left.pop(int(torch.stack(costs).argmin()))
        s = slice(unit * width, (unit + 1) * width)
        core = torch.linalg.inv(inverse[s, s])
        w -= w[:, s] @ core @ inverse[s, :]
        inverse = inverse - inverse[:, s] @ core @ inverse[s, :]
        order.append(unit)
        weights.append(w.clone())
    return order, weights


@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("lazy", [1, 4, 64])
def test_the_order_is_that_of_the_slow_algorithm(monkeypatch, width, lazy):
    monkeypatch.setattr(obs_module, "_LAZY", lazy)
    for seed in range(3):
        x, weight = problem(seed=seed)
        order = obs_order(weight, moment_of(x), width, dampening=DAMP)
        assert order.tolist() == slow_obs(weight, moment_of(x), width)[0]


@pytest.mark.parametrize("width", [1, 6])
def test_the_update_at_once_is_the_sum_of_the_steps(width):
    x, weight = problem()
    order, steps = slow_obs(weight, moment_of(x), width)
    kept_first = torch.tensor(order).flip(0)
    columns = (kept_first[:, None] * width + torch.arange(width)).flatten()
    moment = moment_of(x)[columns][:, columns]
    given = RepairInputs(weight[:, columns], x.mean(0)[columns], moment, DAMP, "w")
    counts = list(range(width, 24, width))
    for count, updated in zip(counts, obs_update(given, counts), strict=True):
        step = steps[len(order) - count // width - 1]
        assert torch.allclose(updated, step[:, columns[:count]], rtol=1e-6, atol=1e-8)


def test_with_the_identity_as_second_moment_it_is_magnitude_without_update():
    _, weight = problem()
    identity = torch.eye(24, dtype=torch.float64)
    for width in (1, 6):
        norms = weight.reshape(12, -1, width).norm(dim=(0, 2))
        assert obs_order(weight, identity, width, dampening=DAMP).tolist() == norms.argsort().tolist()
    given = RepairInputs(weight, torch.zeros(24), identity, DAMP, "w")
    (updated,) = obs_update(given, [10])
    assert torch.allclose(updated, weight[:, :10].double())


def test_equal_units_go_by_position():
    identity, ones = torch.eye(6, dtype=torch.float64), torch.ones(4, 6)
    assert obs_order(ones, identity, 2, dampening=DAMP).tolist() == [0, 1, 2]


def test_a_copy_of_a_channel_goes_first_and_costs_nothing():
    x, weight = problem()
    x[:, 7] = x[:, 20]
    first = int(obs_order(weight, moment_of(x), 1, dampening=1e-9)[0])
    assert first in (7, 20)
    rest = [i for i in range(24) if i != first]
    columns = torch.tensor([*rest, first])
    given = RepairInputs(weight[:, columns], x.mean(0)[columns], moment_of(x)[columns][:, columns], 1e-9, "w")
    (updated,) = obs_update(given, [23])
    assert torch.allclose(x[:, rest] @ updated.T, x @ weight.T.double(), atol=1e-4)


def test_least_squares_is_ridge_regression():
    x, weight = problem()
    kept, moment = x[:, :9], moment_of(x)
    ridge = DAMP * moment.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    target = x @ weight.T.double()
    wanted = torch.linalg.solve(kept.T @ kept / len(x) + ridge, kept.T @ target / len(x)).T
    (updated,) = least_squares(RepairInputs(weight, x.mean(0), moment, DAMP, "w"), [9])
    assert torch.allclose(updated, wanted)


def test_repairs_that_fit_weights_beat_those_that_do_not():
    x, weight = problem()
    given = RepairInputs(weight, x.mean(0), moment_of(x), 1e-6, "w")
    target = x @ weight.T.double()
    for count in (4, 12, 20):

        def error(w, bias=0.0):
            return float((x[:, : w.shape[1]] @ w.T + bias - target).square().mean())

        plain = error(weight[:, :count].double())
        (fit,), (update,), (bias,) = (f(given, [count]) for f in (least_squares, obs_update, mean_bias))
        assert error(weight[:, :count].double(), bias) < plain
        assert error(fit) < plain
        assert error(update) == pytest.approx(error(fit), rel=1e-3)


def test_liar_is_least_squares_with_an_intercept():
    x, weight = problem()
    x = x + 3.0  # means that matter
    given = RepairInputs(weight, x.mean(0), moment_of(x), 1e-12, "w")
    target = x @ weight.T.double()
    for affine, update in zip(interpolated(given, [4, 15]), obs_update(given, [4, 15]), strict=True):
        kept = x[:, : update.shape[1]]
        with_ones = torch.cat([kept, torch.ones(len(x), 1)], 1)
        assert torch.allclose(affine, torch.linalg.lstsq(with_ones, target).solution.T, atol=1e-5)
        residue = with_ones @ affine.T - target
        assert residue.mean(0).abs().max() < 1e-8
        assert residue.square().mean() < 0.999 * (kept @ update.T - target).square().mean()


def test_liar_of_what_is_uncorrelated_is_the_mean():
    x, weight = problem()
    x = torch.linalg.qr(x - x.mean(0)).Q * len(x) ** 0.5 + 2.0
    given = RepairInputs(weight, x.mean(0), moment_of(x), 1e-9, "w")
    (affine,), (bias,) = interpolated(given, [10]), mean_bias(given, [10])
    assert torch.allclose(affine[:, :-1], weight[:, :10].double(), atol=1e-6)
    assert torch.allclose(affine[:, -1], bias, atol=1e-6)


def test_admm_goes_to_the_optimum_of_its_own_dampening():
    x, weight = problem()
    moment = moment_of(x)
    own = moment + DAMP * torch.diag(moment.diagonal())
    wanted = (weight.double() @ own)[:, :9] @ torch.linalg.inv(own[:9, :9])
    (twenty,) = alternating(RepairInputs(weight, x.mean(0), moment, DAMP, "w"), [9])
    many = Fit(weight, moment, dampening=DAMP).masked((torch.arange(24) < 9)[None], n_steps=20_000)
    assert torch.allclose(many[:, :9], wanted, atol=1e-5)
    assert not many[:, 9:].any()
    start = (weight[:, :9].double() - wanted).norm()
    assert (twenty - wanted).norm() < 0.5 * start


def test_inputs_that_were_never_seen_are_no_trouble():
    x, weight = problem()
    x[:, [3, 5]] = 0.0
    order = obs_order(weight, moment_of(x), 1, dampening=DAMP).tolist()
    assert set(order[:2]) == {3, 5}
    assert sorted(obs_order(weight, torch.zeros(24, 24).double(), 1, dampening=DAMP).tolist()) == list(
        range(24)
    )


def test_inputs_that_are_not_finite_name_the_layer():
    x, weight = problem()
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"got NaN or infinity at layer\.7"):
        obs_order(weight, moment_of(x), 1, dampening=DAMP, name="layer.7")
