"""Work and caches sized to a device: equal losses, one wait a batch, levels that stay or pass through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData, batch_tokens
from secateur.evaluators.losses import Teacher, chunk_tokens, loss_sums
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.room import Room, room_beside
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.stores.device_blocks import DeviceBlocks
from secateur.pruners.weights.level_store import build_levels
from secateur.pruners.weights.method import Method
from secateur.spaces.measurement import Fidelity
from tests.blockwise import candidates, make_key, make_space, pruner_of
from tests.models import random_tokens, small_llama
from tests.stand_in.devices import stand_in

CUDA = torch.device("cuda", 0)
LARGE = Fidelity("search", 96)


def test_sizes_are_powers_of_two_within_shares_of_the_room():
    room = Room(123 << 30)
    assert room.chunk_tokens(128_256, 128) == 1024
    assert room.chunk_tokens(32_000, 128) == 4096
    assert Room(1 << 30).chunk_tokens(128_256, 128) == 128
    assert room.batch_tokens(344_064, 2048) == 8192
    assert Room(16 << 30).batch_tokens(344_064, 2048) == 2048
    shares = (room.levels, room.states, room.probabilities, room.changed)
    assert sum(shares) + 2 * (room.n_bytes // 16) < room.n_bytes


def test_the_room_is_what_the_weights_leave_of_the_device_or_of_a_share(monkeypatch):
    model = small_llama()
    n_bytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert room_beside(model, torch.device("cpu")) is None
    with stand_in() as devices:
        model = model.to("cuda")
        assert room_beside(model, CUDA) == Room(devices.total - n_bytes)
        assert dissect(model).room == Room(devices.total - n_bytes)
        monkeypatch.setattr(memory, "_share", 0.25)
        assert room_beside(model, CUDA) == Room(devices.total // 4 - n_bytes)


@pytest.mark.parametrize("keep", [True, False])
def test_losses_are_equal_whatever_the_chunk(keep, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.losses.CHUNK_TOKENS", 8)
    anatomy = dissect(small_llama())
    tokens = random_tokens(6, 20)
    runner = BlockRunner(anatomy)
    hidden = runner.run(runner.start(tokens))
    found, other_hidden = [], hidden + torch.roll(hidden, 1, -1)
    for room in (None, Room(16 * 32 * 97 * 16), Room(1 << 40)):
        sized = replace(anatomy, room=room)
        teacher = Teacher(sized, lambda: hidden, keep=keep)
        found.append((teacher.chunk_tokens, loss_sums(sized, other_hidden, tokens, teacher)))
    assert [chunk for chunk, _ in found] == [8, 16, 4096]
    assert found[0][1].sums["kl"][0] > 0.01
    for _, other in found[1:]:
        assert other.sums.keys() == {"kl", "ce"}
        for name, (total, n) in found[0][1].sums.items():
            assert other.sums[name] == (pytest.approx(total, rel=1e-6), n)
            assert other.windows[name] == pytest.approx(found[0][1].windows[name], rel=1e-5)


def test_positions_are_counted_without_the_device():
    anatomy, tokens = replace(dissect(small_llama()), bos=1), random_tokens(3, 10)
    damaged = torch.zeros(3, 10, dtype=torch.bool)
    damaged[0, :3] = True
    runner = BlockRunner(anatomy)
    hidden = runner.run(runner.start(tokens))
    teacher = Teacher(anatomy, lambda: hidden, keep=True, acceptance=True, damaged=damaged)
    counted = {name: n for name, (_, n) in loss_sums(anatomy, hidden, tokens, teacher).sums.items()}
    assert counted == {"kl": 27, "ce": 24, "acceptance": 27, "weighted_kl": 2}


def evaluator_on(device, directory, room):
    anatomy = dissect(small_llama(n_layers=3).to(device))
    anatomy = replace(anatomy, room=room)
    build_levels(directory, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    space = make_space(anatomy)
    windows = {"search": random_tokens(6, 16, 1), "test": random_tokens(2, 16, 2)}
    data = EvaluationData(anatomy, windows, [LARGE])
    return BlockwiseEvaluator(pruner_of(anatomy, space, directory), data), space


def test_a_batch_of_candidates_waits_once(tmp_path):
    with stand_in() as devices:
        evaluator, space = evaluator_on("cuda", tmp_path, Room(1 << 30))
        texts = candidates(space, 9)
        evaluator.evaluate(texts[:1], LARGE)  # prepares the dense side
        devices.events.clear()
        measured = evaluator.evaluate(texts[1:], LARGE)
        assert all(x.n_tokens == 96 for x in measured)
        assert devices.events.waits == {"copy to host": 1}
        assert devices.events.uploads == 0, "ranks are on the device"


@pytest.mark.parametrize("n_staying", [0, 1, 3])
def test_ranks_that_have_no_room_pass_through_with_equal_losses(tmp_path, n_staying):
    block = sum(x.n_weights for x in dissect(small_llama()).blocks[0].linears)
    room = Room(2 * n_staying * block + 2)
    evaluator, space = evaluator_on("cpu", tmp_path / "cpu", room)
    texts = candidates(space, 6)
    wanted = [x.values for x in evaluator.evaluate(texts, LARGE)]
    with stand_in() as devices:
        on_gpu, _ = evaluator_on("cuda", tmp_path / "cuda", room)
        assert [x.values for x in on_gpu.evaluate(texts, LARGE)] == wanted
        devices.events.clear()
        devices.log.clear()
        on_gpu._prefixes.__init__(0)
        on_gpu._sums.clear()
        assert [x.values for x in on_gpu.evaluate(texts[:2], LARGE)] == wanted[:2]
        assert devices.events.waits == {"copy to host": 1}
        assert (devices.events.uploads > 0) == (n_staying < 3)
        assert ("wait for event" in devices.log) == (n_staying < 3)


def test_the_next_block_is_copied_while_one_is_used():
    stored = [{"x": torch.full((10,), float(i))} for i in range(4)]
    with stand_in() as devices:
        blocks = DeviceBlocks(stored, [CUDA] * 4, 80)
        for _ in range(2):
            assert [float(blocks[i]["x"][0]) for i in range(4)] == [0.0, 1.0, 2.0, 3.0]
        devices.events.clear()
        first = blocks[2]["x"]
        assert devices.events.uploads == 40, "3 is on its way"
        assert blocks[2]["x"] is first
        assert float(blocks[3]["x"][0]) == 3.0
        assert devices.events.uploads == 80, "2 again, for the next candidate"
        assert first.device == CUDA


def test_batches_are_larger_where_there_is_room():
    anatomy = dissect(small_llama())
    assert batch_tokens(anatomy) == 2048
    assert batch_tokens(replace(anatomy, room=Room(1 << 40))) == 8192
    assert chunk_tokens(anatomy) == 128
