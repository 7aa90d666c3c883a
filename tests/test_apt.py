"""APT: its formulas against slow readable forms, growth of ranks, the teacher, and which units go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.learned import apt as module
from secateur.pruners.learned.apt import AdaptiveTuning, apt, share_gone
from secateur.pruners.learned.low_rank import LowRank, TunedSublayer, grown_ranks
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.outlier_salience import Seen, salience, watched
from secateur.pruners.learned.self_distillation import (
    LowestLoss,
    Transformation,
    block_outputs,
    drawn_blocks,
    layer_loss,
    nearest_blocks,
)
from secateur.pruners.learned.training import MaskTrainer, lengthen, step_generator
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.stores.saved_state import SavedState
from tests.models import random_tokens, small_anatomy

TOKENS = random_tokens(4, 24)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(anatomy):
    return [part for layout in find_layouts(anatomy) for part in layout.sublayers]


def tuning_of(anatomy, sparsity=0.3, protected=()):
    return AdaptiveTuning(anatomy, TOKENS, parts_of(anatomy), sparsity, protected)


def trained(anatomy, monkeypatch, steps, sparsity=0.3):
    """The tuning after all steps, with the numbers in its updates after each."""
    monkeypatch.setattr(module, "FEWEST_STEPS", steps)
    tuning, course, adjust = tuning_of(anatomy, sparsity), [], AdaptiveTuning.adjust

    def noted(self, step):
        adjust(self, step)
        course.append(sum(x.n_values for x in self.student.updates.values()))

    monkeypatch.setattr(AdaptiveTuning, "adjust", noted)
    tuning.train(None)
    return tuning, course


def test_salience_by_loops():
    n_units, width, n_out = 3, 2, 5
    x, slopes, weight = normal(4, 6), normal(4, 6, seed=1), normal(n_out, 6, seed=2).exp()
    found = salience(Seen(x.abs().sum(0), slopes.abs().sum(0), x.mean(0)), weight, n_units)
    for unit in range(n_units):
        columns = range(unit * width, (unit + 1) * width)
        products = sum(
            sum(abs(float(x[t, j])) for t in range(4)) * sum(abs(float(slopes[t, j])) for t in range(4))
            for j in columns
        )
        outputs = [
            float(weight[i, j]) * sum(float(x[t, j]) for t in range(4)) / 4
            for j in columns
            for i in range(n_out)
        ]
        mean = sum(outputs) / len(outputs)
        variance = sum((v - mean) ** 2 for v in outputs) / (len(outputs) - 1)
        kurtosis = sum((v - mean) ** 4 for v in outputs) / len(outputs) / variance**2 - 3
        assert float(found[unit]) == pytest.approx(products + math.sqrt(max(0.0, kurtosis)), rel=1e-4)


def test_an_outlier_raises_the_salience_and_an_idle_unit_has_none():
    weight = torch.ones(100, 3)
    weight[:, 1] = torch.linspace(-1, 1, 100)  # flatter than a normal distribution
    weight[7, 2] = 50.0
    zeros, ones = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    idle, flat, outlier = salience(Seen(zeros, ones, ones), weight, 3).tolist()
    assert (idle, flat) == (0.0, 0.0)
    values = weight[:, 2].double()
    z = (values - values.mean()) / values.std()
    assert outlier == pytest.approx(float(z.pow(4).mean() - 3) ** 0.5, rel=1e-4)
    assert outlier > 9


@pytest.mark.parametrize("is_tuned", [True, False])
def test_watched_inputs_have_their_sums_and_those_of_their_gradients(is_tuned):
    seen, weight = [], normal(5, 6)
    x = normal(2, 3, 6, seed=1).requires_grad_(is_tuned)
    inside = x * 3 if is_tuned else x
    out = watched(lambda inputs: F.linear(inputs, weight), seen.append)(inside)
    assert torch.equal(out, F.linear(inside, weight))
    slope = normal(2, 3, 5, seed=2)
    (out * slope).sum().backward()
    (found,) = seen
    assert torch.allclose(found.sizes, inside.detach().abs().sum((0, 1)))
    assert torch.allclose(found.means, inside.detach().mean((0, 1)))
    assert torch.allclose(found.slopes, (slope @ weight).abs().sum((0, 1)), rtol=1e-4)


def test_a_grown_update_computes_as_before_and_goes_on_training():
    linear = next(small_anatomy().linears)
    update = LowRank(linear, 3, seed=0)
    update.left.data = normal(linear.out_features, 3)
    optimizer = torch.optim.AdamW([update.left, update.right], lr=1e-2)
    x = normal(7, linear.in_features, seed=1)

    def step():
        optimizer.zero_grad()
        update.outputs(x).square().sum().backward()
        optimizer.step()

    step()
    before, merged = update.outputs(x).detach(), update.weight
    moments = {name: values.clone() for name, values in optimizer.state[update.left].items()}
    update.grow(5, optimizer)
    assert (update.rank, update.left.shape, update.right.shape) == (5, (len(merged), 5), (5, merged.shape[1]))
    assert torch.allclose(update.outputs(x), before, atol=1e-5)
    assert torch.allclose(update.weight, merged, atol=1e-6)
    assert update.right[3:].abs().max() <= 1 / math.sqrt(linear.in_features)
    assert update.right[3:].std() > 0
    held = optimizer.state[update.left]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(held[name][:, :3], moments[name])
        assert torch.equal(held[name][:, 3:], torch.zeros(len(merged), 2))
    assert optimizer.state[update.right]["exp_avg"].shape == update.right.shape
    step()
    assert (update.left[:, 3:] != 0).all()


def test_a_training_whose_tensors_were_lengthened_goes_on_after_a_kill():
    def run(stop, saved=None):
        tensor = torch.ones(2, 2, requires_grad=True)
        optimizer = torch.optim.AdamW([tensor], lr=0.1)

        def settle(step):
            if step == 3:
                lengthen(optimizer, tensor, torch.full((2, 1), 0.5), 1)

        trainer = MaskTrainer(
            {"x": tensor},
            optimizer,
            lambda step: ((tensor - step) ** 3).sum(),
            8,
            what="x",
            settle=settle,
        )
        if saved:
            trainer.load(saved)
        while trainer.step < stop:
            trainer.take_step()
        return tensor, {name: x.clone() for name, x in trainer.tensors().items()}

    whole, _ = run(8)
    _, saved = run(5)
    again, _ = run(8, saved)
    assert again.shape == (2, 3)
    assert torch.equal(again, whole)


def test_the_more_important_half_grows_by_one_factor_to_the_number_wanted():
    linears = [x for x in small_anatomy().linears if x.role == "q"] * 2
    updates = {name: LowRank(linear, 8, seed=0) for name, linear in zip("abcd", linears, strict=True)}
    each = updates["a"].n_values
    importance = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    assert grown_ranks(updates, importance, 4 * each + 1.3 * each, 64) == {"b": 13, "d": 13}  # 8 * 1.65
    assert grown_ranks(updates, importance, 12.0 * each, 20) == {"b": 20, "d": 20}
    assert grown_ranks(updates, importance, 4.0 * each, 64) == {}
    assert grown_ranks(updates, importance, 3.0 * each, 64) == {}
    optimizer = torch.optim.AdamW([x for update in updates.values() for x in (update.left, update.right)])
    updates["b"].grow(20, optimizer)  # the largest: passed over
    assert grown_ranks(updates, importance, 6.5 * each, 20) == {"c": 12, "d": 12}


def test_ranks_grow_while_units_go_and_within_their_number(monkeypatch):
    first = sum(update.n_values for update in tuning_of(small_anatomy(n_layers=3)).student.updates.values())
    tuning, course = trained(small_anatomy(n_layers=3), monkeypatch, 60)
    assert course[0] == first
    assert course == sorted(course)
    assert course[19:] == [course[19]] * 41  # not after the 20 steps in which units go
    for step, n_values in enumerate(course[:20], start=1):
        assert n_values <= first * (1 + 3 * (16 * step // 20) / 16)
    assert course[-1] > 2.5 * first
    ranks = {update.rank for update in tuning.student.updates.values()}
    assert len(ranks) > 1
    assert max(ranks) <= 64


def test_schedules(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 300)
    tuning = tuning_of(small_anatomy())
    assert [tuning.mu(x) for x in (0, 25, 100, 199, 200, 299)] == [0.0, 0.25, 1.0, 1.0, 0.0, 0.0]
    assert [share_gone(x) for x in (0.0, 0.5, 1.0, 2.0)] == [0.0, 0.875, 1.0, 1.0]


def test_units_are_chosen_by_salience_over_parameters_and_their_gates_fall_and_rise(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 300)
    anatomy = small_anatomy(n_layers=2)
    parts = parts_of(anatomy)
    size = {part.kind: part.unit_params for part in parts}
    total = sum(part.n_units * part.unit_params + part.fixed_params for part in parts)
    tuning = tuning_of(anatomy, size["attention"] / total)
    scores = {part.name: tuning.salience[part.name] for part in parts}
    for part in parts:
        density = {"attention": 0.5, "mlp": 1.0}[
            part.kind
        ]  # the salience of a group is much higher all the same
        scores[part.name].copy_(density * part.unit_params * torch.linspace(1, 1.5, part.n_units))
    last = parts[2]
    assert (last.kind, last.n_units, last.output.block) == ("attention", 2, 1)
    tuning.salience[last.name].mul_(0.9)
    tuning.choose(0.999999)
    gates = tuning.student.gates
    assert gates[last.name].tolist() == pytest.approx([0.9, 1.0])
    assert all((gates[part.name] == 1).all() for part in parts if part is not last)
    for _ in range(3):
        tuning.choose(0.999999)
    assert gates[last.name].tolist() == pytest.approx([0.6, 1.0])
    tuning.salience[last.name].copy_(tuning.salience[last.name].flip(0))
    tuning.choose(0.999999)
    assert gates[last.name].tolist() == pytest.approx([0.7, 0.9])
    tuning.choose(1.0)
    assert gates[last.name].tolist() == [1.0, 0.0]


def test_blocks_of_the_teacher_are_drawn_one_of_each_run():
    seen = {tuple(drawn_blocks(10, step_generator(0, step, torch.device("cpu")))) for step in range(200)}
    assert all(a in {0, 1} and b in {2, 3, 4} and c in {5, 6} and d in {7, 8, 9} for a, b, c, d in seen)
    assert len(seen) == 2 * 3 * 2 * 3
    assert drawn_blocks(3, torch.Generator().manual_seed(0)) == [0, 1, 2]


def test_a_block_is_compared_with_the_closest_that_stays():
    assert nearest_blocks(1, [True, True, True]) == [1]
    assert nearest_blocks(2, [True, True, False, False, True]) == [1, 4]
    assert nearest_blocks(0, [False, False, True]) == [2]
    assert nearest_blocks(1, [False, False]) == []
    student, teacher = normal(4, 2, 3, 5), normal(4, 2, 3, 5, seed=1)
    stays, scale = [True, False, False, True], 1.5
    expected = 0.0
    for index in range(4):
        choices = [index] if stays[index] else [0, 3]
        expected += min(
            sum(
                (scale * a - b) ** 2
                for a, b in zip(student[x].flatten().tolist(), teacher[index].flatten().tolist(), strict=True)
            )
            / 30
            for x in choices
        )
    found = layer_loss([*student], [*teacher], stays, lambda x: scale * x, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    nothing = layer_loss([*student], [*teacher], [False] * 4, lambda x: x, torch.Generator().manual_seed(0))
    assert float(nothing) == 0.0


def test_the_loss_is_a_mixture_of_the_teachers_and_the_cross_entropy(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 300)
    anatomy = small_anatomy(n_layers=3)
    tuning = tuning_of(anatomy)
    assert float(tuning.loss(0).detach()) == pytest.approx(float(ce_loss(anatomy, TOKENS)), rel=1e-5)
    assert float(tuning.loss(40).detach()) == pytest.approx(0.6 * float(ce_loss(anatomy, TOKENS)), rel=1e-4)
    for update in tuning.student.updates.values():
        update.left.data = normal(*update.left.shape) * 0.1
    left, right = tuning.transformation.left, tuning.transformation.right
    left.data = normal(*left.shape, seed=1) * 0.1

    with torch.no_grad(), block_outputs(anatomy) as teacher:
        wanted = anatomy.model(input_ids=TOKENS).logits.log_softmax(-1)
    with (
        torch.no_grad(),
        replaced_forwards(list(anatomy.linears), tuning.student.outputs()),
        block_outputs(anatomy) as student,
    ):
        got = anatomy.model(input_ids=TOKENS).logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
    ce = F.nll_loss(got[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    transform = torch.eye(32) + 2 * left.detach() @ right.detach()
    layers = sum(((x @ transform.T - y) ** 2).mean() for x, y in zip(student, teacher, strict=True))
    expected = 0.4 * (kl + 0.9 * layers) + 0.6 * ce
    assert float(tuning.loss(40).detach()) == pytest.approx(float(expected), rel=1e-4)
    assert float(tuning.loss(100).detach()) == pytest.approx(float(kl + 0.9 * layers), rel=1e-4)


def test_the_student_becomes_the_teacher_where_its_cross_entropy_is_the_lowest_so_far(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 300)
    tuning = tuning_of(small_anatomy())
    (name, *_) = tuning.student.updates
    student, teacher = tuning.student.updates[name], tuning.teacher.updates[name]
    for values, loss, is_renewed in ((1.0, 5.0, True), (2.0, 6.0, False), (3.0, 4.0, True)):
        student.left.data.fill_(values)
        gates = tuning.student.gates[parts_of(small_anatomy())[0].name].fill_(1 / values)
        for change in (-1.0, 0.0, 1.0):
            tuning.course.note(torch.tensor(loss + change))
        with torch.no_grad():
            tuning.adjust(7 if values == 1 else 13 if values == 2 else 19)
        assert bool((teacher.left == values).all()) == is_renewed
        assert torch.equal(tuning.teacher.gates[parts_of(small_anatomy())[0].name], gates) == is_renewed
        assert tuning.course.values[:2].tolist() == [0.0, 0.0]
    student.left.data.fill_(9.0)
    assert not (teacher.left == 9).any()  # a copy


def test_a_mean_is_the_lowest_if_it_is_below_all_before_since_looks():
    course = LowestLoss(torch.device("cpu"))
    for losses, is_lowest in (([5.0, 3.0], True), ([4.0], False), ([9.0, 1.0, 1.0], True), ([3.7], False)):
        for loss in losses:
            assert course.note(torch.tensor(loss)) == loss
        assert course.look() == is_lowest
    assert course.values[2] == pytest.approx(11 / 3)


def test_a_transformation_is_the_identity_until_it_is_trained():
    start = torch.Generator().manual_seed(0)
    one = Transformation(6, 2, 0.5, start, torch.device("cpu"))
    states = normal(1, 4, 6)
    assert torch.equal(one.outputs(states), states)
    one.left.data = normal(6, 2, seed=1)
    expected = states @ (torch.eye(6) + 0.5 * one.left @ one.right).T
    assert torch.allclose(one.outputs(states), expected, atol=1e-6)


class InMemory(SavedState):
    """State in memory, copied as a file would be."""

    def __init__(self):
        self.held = {}

    def load(self):
        return dict(self.held)

    def save(self, tensors):
        self.held = {name: x.clone() for name, x in tensors.items()}

    def clear(self):
        self.held = {}


@pytest.mark.parametrize("step", [1, 6, 14])
def test_a_kill_while_units_go_or_the_teacher_counts_changes_nothing(step, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)
    monkeypatch.setattr(module, "RATE", 1e-2)
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    take, state = MaskTrainer.take_step, InMemory()

    def run(state):
        anatomy = small_anatomy(n_layers=3)
        return apt(anatomy, find_layouts(anatomy), TOKENS, 0.3, state=state)

    def killed(self):
        if self.step == step:
            raise KeyboardInterrupt
        take(self)

    units, weights = run(None)
    monkeypatch.setattr(MaskTrainer, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(state)
    monkeypatch.setattr(MaskTrainer, "take_step", take)
    ranks = {len(x) for name, x in state.held.items() if name.startswith("trained right ")}
    assert max(ranks) > 8
    same, again = run(state)
    assert same == units
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_idle_units_go_first(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 60)
    anatomy = small_anatomy(n_layers=2)
    idle = {0: (3, 17, 40), 1: (0, 1, 2, 30)}
    for block, units in idle.items():
        up = next(x for x in anatomy.blocks[block].linears if x.role == "up")
        up.module.weight.data[list(units)] = 0
    parts = parts_of(anatomy)
    total = sum(part.n_units * part.unit_params + part.fixed_params for part in parts)
    share = 7 * next(part.unit_params for part in parts if part.kind == "mlp") / total
    units, weights = apt(anatomy, find_layouts(anatomy), TOKENS, share)
    assert [sorted(set(range(48)) - set(block["mlp"])) for block in units] == [
        list(idle[block]) for block in (0, 1)
    ]
    assert [len(block["attention"]) for block in units] == [2, 2]
    tuned = {name.rsplit(".", 1)[-1] for name in weights}
    assert tuned == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for linear in anatomy.linears:
        if linear.name in weights:
            assert torch.equal(weights[linear.name], linear.weight) == (linear.role in ("k", "o"))


def test_tuning_lowers_the_loss_of_the_units_that_stay(monkeypatch):
    monkeypatch.setattr(module, "RATE", 1e-2)
    anatomy = small_anatomy(n_layers=3)
    tuning, _ = trained(anatomy, monkeypatch, 90)
    losses = {}
    plain = {
        name: function
        for part in parts_of(anatomy)
        for name, function in TunedSublayer(part, 1, 0, roles=())
        .outputs(tuning.student.gates[part.name])
        .items()
    }
    for name, outputs in (("tuned", tuning.student.outputs()), ("cut", plain)):
        with torch.no_grad(), replaced_forwards(list(anatomy.linears), outputs):
            losses[name] = float(ce_loss(anatomy, TOKENS))
    assert losses["tuned"] < losses["cut"] - 0.5
