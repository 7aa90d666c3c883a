"""The block-wise evaluator: equal to plain evaluation, each shared prefix computed once, weights given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data import windows as data_module
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.prefix_tree import walk
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.weights.level_store import build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.spaces.measurement import Fidelity
from tests.blockwise import LARGE, SMALL, TEST, candidates, make_evaluator, make_key, make_space, pruner_of
from tests.models import random_tokens, small_anatomy

# --- prefix tree ---


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=1, max_size=8))
def test_walking_the_tree_gives_each_path_its_state_and_computes_each_prefix_once(paths):
    steps = []

    def step(path, member, state):
        assert path[:-1] == state
        assert paths[member][: len(path)] == path
        steps.append(path)
        return path

    found = {member: state for members, state in walk(paths, (), step) for member in members}
    assert found == dict(enumerate(paths))
    prefixes = {path[: depth + 1] for path in paths for depth in range(4)}
    assert sorted(steps) == sorted(prefixes)


# --- losses ---


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "random"])
def test_a_level_of_the_store_is_what_pruning_gives(tmp_path, method):
    """Measured through the store = the whole model pruned with dense statistics and run by itself."""
    evaluator = make_evaluator(tmp_path, method)
    text = candidates(evaluator.space, 3)[-1]
    measured = evaluator.evaluate([text], LARGE)[0].values
    anatomy = small_anatomy(n_layers=3)
    sparsity = evaluator.space.config(evaluator.space.parse(text))["sparsity"]
    prune(anatomy, sparsity, Method(method), random_tokens(4, 16), sequential=False)
    tokens = random_tokens(6, 16, 1)
    logits = anatomy.model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    ce = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert measured["ce"] == pytest.approx(float(ce), rel=1e-5)
    zeros = sum(int((linear.weight == 0).sum()) for linear in anatomy.linears)
    assert measured["params"] == 10**6 - zeros


def test_live_losses_are_those_of_the_weights_of_now(tmp_path):
    evaluator = make_evaluator(tmp_path)
    text = candidates(evaluator.space, 3)[-1]
    [measured] = evaluator.evaluate([text], TEST)
    by_store = measured.values
    assert len(measured.windows) == 2
    assert sum(measured.windows) / 2 == pytest.approx(by_store["loss"], rel=1e-5)
    assert evaluator.evaluate([text], SMALL)[0].windows == (), "of the test alone"
    anatomy = small_anatomy(n_layers=3)
    data = EvaluationData(anatomy, {"test": random_tokens(2, 16, 2)}, [TEST])
    data.of(TEST)
    sparsity = evaluator.space.config(evaluator.space.parse(text))["sparsity"]
    prune(anatomy, sparsity, Method("sparsegpt"), random_tokens(4, 16), sequential=False)
    assert data.live_losses(TEST)["kl"] == pytest.approx(by_store["kl"], rel=1e-5)


def test_a_measurement_does_not_depend_on_what_was_measured_before(tmp_path):
    first, second = make_evaluator(tmp_path), make_evaluator(tmp_path)
    texts = candidates(first.space, 4)
    small_first = [first.evaluate(texts, SMALL), first.evaluate(texts, LARGE)]
    large_first = [second.evaluate(texts, LARGE), second.evaluate(texts, SMALL)][::-1]
    for a, b in zip(small_first, large_first, strict=True):
        assert [dict(m.values) for m in a] == [dict(m.values) for m in b]


def test_the_evaluator_leaves_nothing_behind(tmp_path):
    evaluator = make_evaluator(tmp_path)
    text = candidates(evaluator.space, 2)[-1]
    before = evaluator.evaluate([text], SMALL)[0].values
    dense = evaluator.space.baselines()["dense"].text
    assert evaluator.evaluate([dense], SMALL)[0].values["kl"] < 1e-5
    assert evaluator.evaluate([text], SMALL)[0].values == before


def test_a_model_that_overflows_is_infeasible_with_a_reason(tmp_path):
    evaluator = make_evaluator(tmp_path, "magnitude")
    evaluator.evaluate([evaluator.space.baselines()["uniform@0.5"].text], SMALL)
    with torch.no_grad():
        next(evaluator.anatomy.linears).weight.fill_(float("inf"))
    measured = evaluator.evaluate([evaluator.space.baselines()["dense"].text], SMALL)[0]
    assert measured.infeasible == "its loss is not finite: the pruned model overflows"
    assert not measured.values


def test_an_unknown_fidelity_and_a_foreign_candidate_are_refused(tmp_path):
    evaluator = make_evaluator(tmp_path)
    dense = evaluator.space.baselines()["dense"].text
    with pytest.raises(ValueError, match="Expected one of the fidelities"):
        evaluator.evaluate([dense], Fidelity("search", 48))
    with pytest.raises(ValueError, match="Expected an allocation"):
        evaluator.evaluate(["something"], SMALL)
    with pytest.raises(ValueError, match="whole windows of 16 tokens, at most 32"):
        EvaluationData(small_anatomy(), {"test": random_tokens(2, 16)}, [Fidelity("test", 40)])


# --- shared blocks ---


def test_shared_losses_equal_unshared_ones_and_blocks_are_counted(tmp_path):
    evaluator = make_evaluator(tmp_path)
    texts = candidates(evaluator.space, 12)
    together = evaluator.evaluate(texts, LARGE)
    alone = [make_evaluator(tmp_path).evaluate([text], LARGE)[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert a.candidate == b.candidate
        for name in ("kl", "ce", "loss"):
            assert a.values[name] == pytest.approx(b.values[name], rel=1e-6)
    assert sum(m.blocks_saved for m in together) > 0
    assert all(m.blocks_saved == 0 for m in alone)
    for a, b in zip(together, alone, strict=True):
        assert a.blocks + a.blocks_saved == b.blocks
    paths = [tuple(space_path(evaluator, text)) for text in texts]
    prefixes = {path[: depth + 1] for path in paths for depth in range(3)}
    n_batches = alone[0].blocks // 3
    assert sum(m.blocks for m in together) == n_batches * len(prefixes)


def space_path(evaluator: BlockwiseEvaluator, text: str) -> list[object]:
    config = evaluator.space.config(evaluator.space.parse(text))["sparsity"]
    return [tuple(config[linear.name] for linear in block.linears) for block in evaluator.anatomy.blocks]


def test_earlier_batches_are_shared_too_and_change_nothing(tmp_path, monkeypatch):
    evaluator = make_evaluator(tmp_path)
    texts = candidates(evaluator.space, 6)
    small = evaluator.evaluate(texts, SMALL)
    large = evaluator.evaluate(texts, LARGE)
    again = evaluator.evaluate(texts, LARGE)
    assert sum(m.blocks for m in large) < 3 * sum(m.blocks for m in small), (
        "the small part is not computed again"
    )
    assert sum(m.blocks for m in again) == 0
    monkeypatch.setattr("secateur.evaluators.blockwise.MAX_PREFIX_BYTES", 0)
    bare = make_evaluator(tmp_path)
    for a, b, c in zip(large, again, bare.evaluate(texts, LARGE), strict=True):
        assert dict(a.values) == dict(b.values)
        assert a.values["kl"] == pytest.approx(c.values["kl"], rel=1e-6)


def test_what_offspring_shared_is_there_for_the_next_ones_where_room_is_scarce(tmp_path, monkeypatch):
    evaluator = make_evaluator(tmp_path)
    output = 2 * 16 * evaluator.anatomy.width * 4
    for bound in ("MIN_PREFIX_BYTES", "MAX_PREFIX_BYTES"):
        monkeypatch.setattr(f"secateur.evaluators.blockwise.{bound}", 2 * output)
    scarce = make_evaluator(tmp_path)
    n_slots = len(scarce.space.slots)
    texts = [scarce.space.assemble((2,) * (n_slots - 1) + (level,)).text for level in range(5)]
    first, second = scarce.evaluate(texts[:2], SMALL), scarce.evaluate(texts[2:4], SMALL)
    assert sum(m.blocks for m in first) == 2 + 2, "two blocks for both, the last one for each"
    assert sum(m.blocks for m in second) == 2, "their last blocks alone"
    assert sum(m.blocks for m in scarce.evaluate(texts[4:], SMALL)) == 1
    for a, b in zip([*first, *second], evaluator.evaluate(texts[:4], SMALL), strict=True):
        assert a.values["kl"] == pytest.approx(b.values["kl"], rel=1e-6)


# --- memory ---


@pytest.mark.parametrize("n_stay", [0, 1, 2])
def test_blocks_past_the_memory_for_copies_are_dense_again_once_they_are_computed(
    tmp_path, monkeypatch, n_stay
):
    usual = make_evaluator(tmp_path, "wanda")
    texts = candidates(usual.space, 8)
    of_block = sum(linear.weight.nbytes for linear in usual.anatomy.blocks[0].linears)
    for bound in ("MIN_CHANGED_BYTES", "MAX_CHANGED_BYTES"):
        monkeypatch.setattr(f"secateur.evaluators.blockwise.{bound}", n_stay * of_block)
    evaluator = make_evaluator(tmp_path, "wanda")
    dense = [linear.weight.data_ptr() for linear in evaluator.anatomy.linears]
    expected = usual.evaluate(texts, LARGE)
    computed, most = BlockRunner.block, 0

    def block(self, index, hidden, inputs):
        nonlocal most
        now = zip(evaluator.anatomy.linears, dense, strict=True)
        most = max(most, len({linear.block for linear, old in now if linear.weight.data_ptr() != old}))
        return computed(self, index, hidden, inputs)

    monkeypatch.setattr(BlockRunner, "block", block)
    for a, b in zip(evaluator.evaluate(texts, LARGE), expected, strict=True):
        assert dict(a.values) == dict(b.values)
    assert most == n_stay + 1


def test_memory_of_a_released_block_is_used_again_and_that_of_others_is_not(tmp_path):
    anatomy = small_anatomy(n_layers=3)
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    pruner, [first, second, _] = pruner_of(anatomy, make_space(anatomy), tmp_path), anatomy.blocks
    half, quarter = (2,) * len(first.linears), (1,) * len(first.linears)
    pruner.apply(0, half)
    seen = [(linear.weight, linear.weight.clone()) for linear in first.linears]
    pruner.restore()  # what someone has a hold of stays as it is
    pruner.apply(1, quarter)
    assert all(torch.equal(weight, copy) for weight, copy in seen)
    made = {linear.weight.data_ptr() for linear in second.linears}
    expected = [linear.weight.clone() for linear in second.linears]
    pruner.release(1)
    pruner.apply(0, half)
    assert {linear.weight.data_ptr() for linear in first.linears} == made
    assert all(torch.equal(x.weight, copy) for x, (_, copy) in zip(first.linears, seen, strict=True))
    pruner.apply(1, quarter)
    assert all(torch.equal(x.weight, weight) for x, weight in zip(second.linears, expected, strict=True))
    pruner.restore()


def test_past_the_memory_limit_the_dense_side_is_computed_again(tmp_path, monkeypatch):
    kept = make_evaluator(tmp_path)
    text = candidates(kept.space, 2)[-1]
    expected = kept.evaluate([text], LARGE)[0].values["kl"]
    monkeypatch.setattr(data_module, "TEACHER_BYTES", 0)
    assert make_evaluator(tmp_path).evaluate([text], LARGE)[0].values["kl"] == pytest.approx(
        expected, rel=1e-3
    )
