from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data import windows as data_module
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.losses import Teacher, loss_sums
from secateur.evaluators.prefix_tree import walk
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.pruner import DenseModel
from secateur.pruners.stores.block_files import LevelStoreError, is_built
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner, prune
from secateur.spaces.allocation.settings import AllocationSettings
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity
from secateur.spaces.shape import ModelShape, Prunable, group
from tests.models import random_tokens, small_anatomy

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHAPE = ModelShape(10**6, 4, 10**6, 10)
SMALL, LARGE, TEST = Fidelity("search", 32), Fidelity("search", 96), Fidelity("test", 32)


def make_space(anatomy: Anatomy) -> AllocationSpace:
    linears = [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in anatomy.linears]
    return AllocationSpace(group(linears, "linear"), (), LEVELS, (0.5,), SHAPE)


def make_key(method: Method) -> StoreKey:
    return StoreKey("model", "float32", "tokens", method, LEVELS)


def pruner_of(anatomy, space, levels) -> AllocationPruner:
    pruner = AllocationPruner(AllocationSettings(), DenseModel(anatomy, "model", SHAPE), space=space)
    pruner.open(levels)
    return pruner


def make_evaluator(tmp_path, method: str = "sparsegpt", **kwargs: object) -> BlockwiseEvaluator:
    anatomy = small_anatomy(n_layers=3)
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method(method)))
    space = make_space(anatomy)
    windows = {"search": random_tokens(6, 16, 1), "test": random_tokens(2, 16, 2)}
    data = EvaluationData(anatomy, windows, [SMALL, LARGE, TEST])
    pruner = pruner_of(anatomy, space, tmp_path)
    evaluator = BlockwiseEvaluator(pruner, data, **kwargs)
    evaluator.anatomy, evaluator.space = anatomy, space  # for the tests
    return evaluator


def candidates(space: AllocationSpace, n: int) -> list[str]:
    """A family: mutants of mutants, so that prefixes are shared to different depths."""
    rng = torch.Generator().manual_seed(0)
    import numpy as np

    generator = np.random.default_rng(0)
    found = [space.baselines()["uniform@0.5"]]
    while len(found) < n:
        parent = found[int(torch.randint(len(found), (1,), generator=rng))]
        child = space.mutate(parent, generator)
        if child not in found:
            found.append(child)
    return [candidate.text for candidate in found]


# --- losses ---


def dense_side(anatomy: Anatomy, tokens: Tensor) -> tuple[Tensor, Tensor]:
    runner = BlockRunner(anatomy)
    return runner.run(runner.start(tokens)), anatomy.model(input_ids=tokens).logits


@pytest.mark.parametrize("keep", [True, False])
def test_losses_equal_the_plain_ones(keep, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.losses.CHUNK_TOKENS", 7)
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    hidden, dense = dense_side(anatomy, tokens)
    dense_hidden = hidden
    teacher = Teacher(anatomy, lambda: dense_hidden, keep=keep)
    sparsity = dict.fromkeys((x.name for x in anatomy.linears), 0.5)
    prune(anatomy, sparsity, Method("magnitude"), tokens, sequential=False)
    hidden, pruned = dense_side(anatomy, tokens)
    found = loss_sums(anatomy, hidden, tokens, teacher).means()
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert kl > 0.1, "pruning shows"
    assert found["kl"] == pytest.approx(float(kl), rel=2e-3 if keep else 1e-4)
    assert found["ce"] == pytest.approx(float(ce), rel=1e-5)


def test_the_dense_model_has_no_kl():
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    hidden, _ = dense_side(anatomy, tokens)
    assert (
        loss_sums(anatomy, hidden, tokens, Teacher(anatomy, lambda: hidden, keep=True)).means()["kl"] < 1e-5
    )


def test_processes_share_one_dense_side(tmp_path):
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    hidden, _ = dense_side(anatomy, tokens)
    file = tmp_path / "dense.safetensors"
    first = Teacher(anatomy, lambda: hidden, keep=True, file=file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    def never() -> Tensor:
        raise AssertionError("it is there already")

    second = Teacher(anatomy, never, keep=True, file=file)
    alone = Teacher(anatomy, lambda: hidden, keep=True)
    losses = [loss_sums(anatomy, hidden * 1.1, tokens, teacher) for teacher in (first, second, alone)]
    assert losses[0] == losses[1] == losses[2]
    elsewhere = tmp_path / "missing" / "dense.safetensors"  # as on a full disk
    assert (
        loss_sums(anatomy, hidden * 1.1, tokens, Teacher(anatomy, lambda: hidden, keep=True, file=elsewhere))
        == losses[2]
    )


def test_the_dense_side_is_shared_by_those_who_name_it_alike(tmp_path):
    """Two models may have the same windows, and even the same staged directory."""
    windows = {"search": random_tokens(6, 16, 1), "test": random_tokens(2, 16, 2)}
    models = {"one": small_anatomy(), "two": small_anatomy()}
    with torch.no_grad():
        models["two"].head.weight.mul_(3)
    losses = {}
    for name in ("one", "two", "one"):
        data = EvaluationData(models[name], windows, [SMALL], shared=tmp_path / f".dense-{name}")
        data.of(SMALL)
        assert data.live_losses(SMALL)["kl"] < 1e-5
        losses.setdefault(name, []).append(data.live_losses(SMALL)["ce"])
    assert losses["one"][0] == losses["one"][1] != losses["two"][0]
    assert len(list(tmp_path.iterdir())) == 2


def test_losses_of_a_bfloat16_model_are_accumulated_finely():
    """In bfloat16 a mean near 4 has steps of 1/32; the sums here must resolve far less."""
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    anatomy.model.to(torch.bfloat16)
    hidden, logits = dense_side(anatomy, tokens)
    ce = loss_sums(anatomy, hidden, tokens, Teacher(anatomy, lambda: hidden, keep=True)).means()["ce"]
    exact = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert ce == pytest.approx(float(exact), abs=1e-4)


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


# --- the evaluator ---


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


def test_a_measurement_does_not_depend_on_what_was_measured_before(tmp_path):
    first, second = make_evaluator(tmp_path), make_evaluator(tmp_path)
    texts = candidates(first.space, 4)
    small_first = [first.evaluate(texts, SMALL), first.evaluate(texts, LARGE)]
    large_first = [second.evaluate(texts, LARGE), second.evaluate(texts, SMALL)][::-1]
    for a, b in zip(small_first, large_first, strict=True):
        assert [dict(m.values) for m in a] == [dict(m.values) for m in b]


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
    computed, most = evaluator._runner.block, 0

    def block(index, hidden, inputs):
        nonlocal most
        now = zip(evaluator.anatomy.linears, dense, strict=True)
        most = max(most, len({linear.block for linear, old in now if linear.weight.data_ptr() != old}))
        return computed(index, hidden, inputs)

    monkeypatch.setattr(evaluator._runner, "block", block)
    for a, b in zip(evaluator.evaluate(texts, LARGE), usual.evaluate(texts, LARGE), strict=True):
        assert dict(a.values) == dict(b.values)
    assert most == n_stay + 1


def test_memory_of_a_released_block_is_used_again_and_that_of_others_is_not(tmp_path):
    evaluator = make_evaluator(tmp_path, "wanda")
    pruner, [first, second, _] = evaluator._pruner, evaluator.anatomy.blocks
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


def test_past_the_memory_limit_the_dense_side_is_computed_again(tmp_path, monkeypatch):
    kept = make_evaluator(tmp_path)
    text = candidates(kept.space, 2)[-1]
    expected = kept.evaluate([text], LARGE)[0].values["kl"]
    monkeypatch.setattr(data_module, "TEACHER_BYTES", 0)
    assert make_evaluator(tmp_path).evaluate([text], LARGE)[0].values["kl"] == pytest.approx(
        expected, rel=1e-3
    )


# --- the level store ---


def test_a_store_that_was_cut_short_goes_on(tmp_path):
    anatomy, key, seen = small_anatomy(), make_key(Method("wanda")), []

    class Cut(Exception):  # noqa: N818
        pass

    def cut(index: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        build_levels(tmp_path, anatomy, random_tokens(4, 16), key, on_block=cut)
    assert not is_built(tmp_path, key)
    first = (tmp_path / "block-0000.safetensors").stat().st_mtime_ns
    build_levels(tmp_path, anatomy, random_tokens(4, 16), key, on_block=seen.append)
    assert is_built(tmp_path, key)
    assert seen == [0, 1]
    assert (tmp_path / "block-0000.safetensors").stat().st_mtime_ns == first


def test_a_store_of_another_key_is_made_anew(tmp_path):
    anatomy = small_anatomy()
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    assert not is_built(tmp_path, make_key(Method("magnitude")))
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("magnitude")))
    linear = next(anatomy.linears)
    found = LevelStore(tmp_path, anatomy, LEVELS).weight(linear, 2)
    lowest_kept = linear.weight.abs()[found != 0].min()
    assert linear.weight.abs()[found == 0].max() <= lowest_kept


def test_blocks_of_another_key_are_no_part_of_a_store_that_was_cut_short(tmp_path):
    class Cut(Exception):  # noqa: N818
        pass

    def cut(index: int) -> None:
        raise Cut

    anatomy, tokens = small_anatomy(), random_tokens(4, 16)
    wanda, magnitude = make_key(Method("wanda")), make_key(Method("magnitude"))
    build_levels(tmp_path / "alone", anatomy, tokens, magnitude)
    build_levels(tmp_path / "levels", anatomy, tokens, wanda)
    with pytest.raises(Cut):
        build_levels(tmp_path / "levels", anatomy, tokens, magnitude, on_block=cut)
    build_levels(tmp_path / "levels", anatomy, tokens, magnitude)
    name = "block-0001.safetensors"
    assert (tmp_path / "levels" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        LevelStoreError, match=r"Expected \d+ MB of room for the level store .* run the same command"
    ):
        build_levels(tmp_path / "levels", small_anatomy(), random_tokens(4, 16), make_key(Method("wanda")))
    assert not any((tmp_path / "levels").iterdir())


def test_a_damaged_store_is_named(tmp_path):
    anatomy = small_anatomy()
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    (tmp_path / "block-0001.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"Expected a block of the level store, got .*block-0001"):
        LevelStore(tmp_path, anatomy, LEVELS)
