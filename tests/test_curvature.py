"""Curvature of the dense model and gradients at a candidate, against autograd over the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.effects import EffectsEvaluator
from secateur.pruners.calibration.backward import backward_blocks, head_gradient
from secateur.pruners.curvature import FILE, build_curvature, load_curvature
from secateur.pruners.effects import Foretelling
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.options import AllOptions
from secateur.pruners.pruner import DenseModel
from secateur.pruners.stores.block_files import LevelStoreError
from secateur.pruners.weights.level_store import StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner
from secateur.spaces.allocation.settings import AllocationSettings
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Prunable, group
from tests.models import random_tokens, small_llama

LEVELS = (0.0, 0.25, 0.5, 0.75)
SHAPE = ModelShape(10**6, 4, 10**6, 10)
SEARCH, GRADIENT = Fidelity("search", 32), Fidelity("gradient", 48)
TOKENS = random_tokens(4, 16)
CANDIDATE = "allocation:1x7,2x7"


@pytest.fixture
def pruner(tmp_path) -> AllocationPruner:
    """Open over the levels of a small Llama in fp64, so that differences of losses are exact."""
    anatomy = dissect(small_llama().double())
    linears = [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in anatomy.linears]
    space = AllocationSpace(group(linears, "linear"), (), LEVELS, (0.5,), SHAPE)
    key = StoreKey("model", "float64", "tokens", Method("sparsegpt"), LEVELS)
    build_levels(tmp_path, anatomy, TOKENS, key)
    made = AllocationPruner(AllocationSettings(), DenseModel(anatomy, "model", SHAPE), space=space)
    made.open(tmp_path)
    return made


def weights(anatomy) -> dict[str, torch.Tensor]:
    return {linear.name: linear.weight for linear in anatomy.linears}


def evaluator(pruner: AllocationPruner, directory, loss: str = "kl") -> EffectsEvaluator:
    windows = {"search": random_tokens(2, 16, 1), "gradient": random_tokens(5, 16, 2)}
    data = EvaluationData(pruner.anatomy, windows, [SEARCH])
    build_curvature(pruner, directory, TOKENS[:2])
    foretelling = Foretelling(pruner, load_curvature(directory))
    measured = BlockwiseEvaluator(pruner, data, loss=loss)
    return EffectsEvaluator(measured, pruner, data, foretelling, loss=loss)


def test_gradients_of_every_projection_are_those_of_autograd_over_the_whole_model() -> None:
    model = small_llama().requires_grad_(True)
    anatomy = dissect(model)
    logits = model(input_ids=TOKENS).logits
    expected = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten(), reduction="sum"),
        [linear.module.weight for linear in anatomy.linears],
    )
    model.requires_grad_(False)
    parts = TOKENS.split(1)

    def top(number: int, hidden: torch.Tensor) -> torch.Tensor:
        one_hot = F.one_hot(parts[number].flatten(), 97)
        return head_gradient(anatomy, hidden, lambda chunk, logits: logits.softmax(-1) - one_hot)

    found: dict[str, torch.Tensor] = {}

    def add(linear, inputs, gradients) -> None:
        found[linear.name] = found.get(linear.name, 0) + gradients.T @ inputs

    names = [linear.name for linear in anatomy.linears]
    batches = [BlockRunner(anatomy).start(part) for part in parts]
    blocks = [block.index for block in backward_blocks(anatomy, batches, top, add, watched=names)]
    assert blocks == [1, 0]
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_form_is_the_mean_over_tokens_of_products_of_the_foretold_changes(pruner, tmp_path) -> None:
    anatomy, tokens = pruner.anatomy, TOKENS[:2]
    build_curvature(pruner, tmp_path, tokens)
    drawn = torch.Generator().manual_seed(0)
    inputs, outputs = {}, {}

    def keep(linear):
        def hook(module, args, output) -> None:
            inputs[linear.name] = args[0].detach().flatten(0, 1)
            output.requires_grad_(True)
            outputs[linear.name] = output

        return hook

    hooks = [linear.module.register_forward_hook(keep(linear)) for linear in anatomy.linears]
    logits = anatomy.model(input_ids=tokens).logits.flatten(0, 1).float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), [*outputs.values()])
    for hook in hooks:
        hook.remove()
    forms, n = load_curvature(tmp_path).forms, tokens.numel()
    dense = weights(anatomy)
    for slot, (name, gradient) in enumerate(zip(outputs, gradients, strict=True)):
        g, x = gradient.flatten(0, 1).double(), inputs[name].double()
        at = [
            pruner.weights_of(slot // 7, (level,) * 7)[name].double() - dense[name].double()
            for level in range(4)
        ]
        slopes = [torch.einsum("to,oi,ti->t", g, change, x) for change in at]
        slow = [[float((a * b).sum() / n) for b in slopes] for a in slopes]
        torch.testing.assert_close(forms[slot], torch.tensor(slow, dtype=torch.float64), rtol=1e-3, atol=1e-6)


def test_first_order_is_the_slope_of_the_loss_towards_every_option(pruner, tmp_path) -> None:
    of, anatomy, space = evaluator(pruner, tmp_path), pruner.anatomy, pruner.space
    (found,) = of.evaluate([CANDIDATE], GRADIENT)
    options = space.disassemble(space.parse(CANDIDATE))
    batches = of._data.drawn("gradient", 0, 80)  # all five windows, of which the candidate has three in a row
    starts = [torch.cat([batches[(start + i) % 5].tokens for i in range(3)]) for start in range(5)]
    dense = weights(anatomy)

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        """Of the dense model's logits against the live one's."""
        live = weights(anatomy)
        for linear in anatomy.linears:
            linear.point_to(dense[linear.name])
        p = anatomy.model(input_ids=tokens).logits.softmax(-1)
        for linear in anatomy.linears:
            linear.point_to(live[linear.name])
        q = anatomy.model(input_ids=tokens).logits.log_softmax(-1)
        return (p * (p.log() - q)).sum(-1).mean()

    everything = AllOptions(pruner)
    for block in range(2):
        everything.point(block, options)
    own = weights(anatomy)
    kl = [float(losses(tokens)) for tokens in starts]
    start = min(range(5), key=lambda i: abs(kl[i] - found.values["kl"]))
    assert kl[start] == pytest.approx(found.values["kl"], rel=1e-3)
    assert found.effects is not None
    for slot in (0, 5, 9, 13):
        for option in range(4):
            linear = [*anatomy.linears][slot]
            there = pruner.weights_of(slot // 7, (option,) * 7)[linear.name]
            step = 1e-4
            sides = []
            for side in (step, -step):
                linear.point_to(own[linear.name] + side * (there - own[linear.name]))
                sides.append(float(losses(starts[start])))
            linear.point_to(own[linear.name])
            slope = (sides[0] - sides[1]) / (2 * step)
            assert found.effects.first[slot][option] == pytest.approx(slope, rel=2e-2, abs=2e-4)


def test_dense_model_has_no_slope_and_its_second_order_foretells_single_levels(pruner, tmp_path) -> None:
    of, space = evaluator(pruner, tmp_path), pruner.space
    (found,) = of.evaluate([space.baselines()["dense"].text], GRADIENT)
    assert found.values["loss"] == 0.0
    assert found.n_tokens == 3 * 48
    assert found.effects is not None
    assert not any(any(row) for row in found.effects.first)
    foretold, measured = [], []
    for slot in range(14):
        options = [0] * 14
        options[slot] = 1
        (single,) = of.evaluate([space.assemble(options).text], SEARCH)
        measured.append(single.values["kl"])
        foretold.append(found.effects.second[slot][1])
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (foretold, measured)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.6
    assert 1 / 3 < sum(foretold) / sum(measured) < 3


def test_cross_entropy_has_a_slope_at_the_dense_model_and_other_parts_are_measured_as_before(
    pruner, tmp_path
) -> None:
    of, dense = evaluator(pruner, tmp_path, "ce"), pruner.space.baselines()["dense"].text
    before = weights(pruner.anatomy)
    (found,) = of.evaluate([dense], GRADIENT)
    assert found.effects is not None
    assert any(any(row) for row in found.effects.first)
    assert found.values["loss"] == found.values["ce"] > 1
    (plain,) = of.evaluate([dense], SEARCH)
    assert plain.effects is None
    assert plain.values["kl"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(before[name], weight) for name, weight in weights(pruner.anatomy).items())


def test_effects_survive_their_line_of_a_study_and_nonsense_is_refused(pruner, tmp_path) -> None:
    (found,) = evaluator(pruner, tmp_path).evaluate([CANDIDATE], GRADIENT)
    line = found.to_json()
    assert Measurement.from_json(line).effects == found.effects
    for damage in ([], {"first": [[1.0]], "second": [[1.0, 2.0]]}, {"first": [["a"]], "second": [[0.0]]}):
        with pytest.raises(ValueError, match="effects"):
            Measurement.from_json(line | {"effects": damage})


def test_curvature_is_built_once_and_anew_for_other_tokens(pruner, tmp_path) -> None:
    build_curvature(pruner, tmp_path, TOKENS[:2])
    written = (tmp_path / FILE).stat().st_mtime_ns
    build_curvature(pruner, tmp_path, TOKENS[:2])
    assert (tmp_path / FILE).stat().st_mtime_ns == written
    build_curvature(pruner, tmp_path, TOKENS[2:])
    assert (tmp_path / FILE).stat().st_mtime_ns > written
    (tmp_path / FILE).unlink()
    with pytest.raises(LevelStoreError, match="no such file"):
        load_curvature(tmp_path)
