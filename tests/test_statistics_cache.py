"""The cache of statistics on disk, and what is collected into it: as if it had been collected directly."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from secateur.pruners.calibration import collected as calibration_statistics
from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.stores.block_files import LevelStoreError
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, build

TOKENS = random_tokens(5, 12)


def statistics(directory, tokens=TOKENS, *, anatomy=None, identity="m", limit=1 << 30, **others):
    cache = StatisticsCache(directory, limit)
    return CalibrationStatistics(anatomy or small_anatomy(), tokens, cache, identity, **others)


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.fixture
def passes(monkeypatch):
    """What was collected, in order."""
    seen = []
    walk, gradients = calibration_statistics.walk_dense, calibration_statistics.collect_gradients
    monkeypatch.setattr(
        calibration_statistics,
        "walk_dense",
        lambda *args, gram, **more: (
            seen.append("gram" if gram else "moments") or walk(*args, gram=gram, **more)
        ),
    )
    monkeypatch.setattr(
        calibration_statistics,
        "collect_gradients",
        lambda anatomy, tokens, kinds, **others: (
            seen.append(tuple(kinds)) or gradients(anatomy, tokens, kinds, **others)
        ),
    )
    return seen


# --- what is collected ---


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("gram", [False, True])
def test_activations_are_what_the_single_walks_collect(tmp_path, family, gram):
    anatomy = dissect(build(CONFIGS[family]))
    found = statistics(tmp_path, anatomy=anatomy)
    detail = "gram" if gram else "moments"
    inputs = stream_blocks(anatomy, TOKENS, inputs=detail)
    outputs = stream_blocks(anatomy, TOKENS, outputs=detail)
    for block, (of_inputs, of_outputs) in enumerate(zip(inputs, outputs, strict=True)):
        here, there = found.inputs(block, gram), of_inputs.inputs
        assert here.keys() == there.keys()
        assert all(same(here[name], there[name]) for name in there)
        shared = [[x[a] is x[b] for a in there for b in there] for x in (here, there)]
        assert shared[0] == shared[1]
        here = found.outputs(block, gram)
        assert here.keys() == of_outputs.outputs.keys()
        assert all(same(here[name], of_outputs.outputs[name]) for name in here)
        assert found.influence[block] == of_outputs.influence


def test_a_result_does_not_depend_on_what_else_was_collected(tmp_path):
    first, second = statistics(tmp_path / "a"), statistics(tmp_path / "b")
    second.prepare(outputs="gram")
    for block in range(2):
        for gram in (False, True):
            for kind in ("inputs", "outputs"):
                one, other = (getattr(x, kind)(block, gram) for x in (first, second))
                assert all(same(one[name], other[name]) for name in one)
    assert first.influence == second.influence


def test_gradients_are_what_is_collected_directly(tmp_path):
    kinds, few = ("rms", "sums", "perturbed"), random_tokens(2, 4)
    direct = collect_gradients(small_anatomy(), few, kinds)
    whole = statistics(tmp_path, few).whole(kinds)
    assert whole.n_blocks == 2
    assert whole.gradients.keys() == direct.keys()
    for kind, by_name in direct.items():
        assert by_name.keys() == whole.gradients[kind].keys()
        assert all(torch.equal(tensor, whole.gradients[kind][name]) for name, tensor in by_name.items())


def test_signed_gradients_from_forward_passes_are_estimates_and_kept_apart(tmp_path, monkeypatch):
    asked = []

    def collect(anatomy, tokens, kinds, *, contrast, states):
        asked.extend(kinds)
        return {kind: {x.name: torch.full((2,), len(kind)) for x in anatomy.linears} for kind in kinds}

    monkeypatch.setattr(calibration_statistics, "collect_gradients", collect)
    for forward, kind in ((True, "forward"), (False, "mean"), (True, "forward")):
        (by_name,) = statistics(tmp_path, forward=forward).gradients(["mean"]).values()
        assert all((tensor == len(kind)).all() for tensor in by_name.values())
    assert asked == ["forward", "mean"]


def test_gradients_that_forward_passes_do_not_give_are_refused_first(tmp_path, passes):
    with pytest.raises(ValueError, match=r"Expected `gradients: forward` with .* got one that takes 'rms'"):
        statistics(tmp_path, forward=True).prepare(inputs="gram", gradients=["mean", "rms"])
    assert not passes


def test_a_second_metric_collects_only_what_is_new(tmp_path, passes):
    statistics(tmp_path).prepare(inputs="moments", gradients=["rms", "sums"])
    assert passes == [("rms", "sums"), "moments"]
    again = statistics(tmp_path)
    again.prepare(outputs="moments", gradients=["sums"])
    assert again.influence
    again.gradients(["rms"])
    assert len(passes) == 2
    again.prepare(inputs="gram", outputs="moments", gradients=["mean", "rms"])
    assert passes[2:] == [("mean",), "gram"]
    last = statistics(tmp_path)
    last.prepare(inputs="gram", outputs="gram", gradients=["rms", "mean", "sums"])
    assert len(passes) == 4


def test_other_windows_another_shape_or_another_model_are_other_statistics(tmp_path, passes):
    same_ids = TOKENS.reshape(10, 6)
    for tokens, identity in ((TOKENS, "m"), (same_ids, "m"), (TOKENS + 1, "m"), (TOKENS, "n")):
        statistics(tmp_path, tokens, identity=identity).prepare(inputs="moments")
    assert passes == ["moments"] * 4


# --- the limit ---


def entries(directory):
    return sorted(place.name for place in directory.iterdir() if not place.name.startswith(".lock"))


def size(directory):
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def put(cache, key, n_bytes=4000):
    with cache.locked(key.partition(".")[0]):
        return cache.put(key, [{"x": torch.zeros(n_bytes // 8)}, {"y": torch.ones(n_bytes // 8)}])


def test_the_entries_used_longest_ago_go_first(tmp_path):
    cache = StatisticsCache(tmp_path, 3 * 4400)
    for key in ("a.x", "b.x", "c.x"):
        put(cache, key)
    assert cache.get("a.x") is not None  # used again
    put(cache, "d.x")
    assert entries(tmp_path) == ["a.x", "c.x", "d.x"]
    put(cache, "e.x", 8000)
    assert entries(tmp_path) == ["d.x", "e.x"]
    assert cache.get("c.x") is None
    assert size(tmp_path) <= cache.limit_bytes


def test_what_is_in_use_outlives_its_entry(tmp_path):
    cache = StatisticsCache(tmp_path, 5000)
    put(cache, "a.x")
    held = cache.get("a.x")
    put(cache, "b.x")
    assert entries(tmp_path) == ["b.x"]
    assert held[1]["y"].sum() == 500


def test_what_can_not_be_kept_is_refused_before_it_is_collected(tmp_path, passes, monkeypatch):
    tight = statistics(tmp_path, limit=1000)
    for asked in ({"outputs": "gram"}, {"gradients": ["rms"]}):
        with pytest.raises(
            LevelStoreError,
            match=r"Expected a cache of statistics of at least 0\.\d MB for .*limit of 0\.0 MB",
        ):
            tight.prepare(**asked)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LevelStoreError, match=r"Expected 1 MB of room for gradients in .*, got 0 MB"):
        statistics(tmp_path).prepare(gradients=["rms"])
    assert not passes


def test_statistics_stay_right_when_the_limit_throws_them_out(tmp_path, passes):
    tight, wide = statistics(tmp_path / "tight", limit=70_000), statistics(tmp_path / "wide")
    for found in (tight, wide):
        found.prepare(inputs="gram", gradients=["rms"])
    assert len(entries(tmp_path / "tight")) == 1
    assert len(entries(tmp_path / "wide")) == 2
    gradients = [found.gradients(["rms"])["rms"] for found in (tight, wide)]
    assert all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())
    assert same(*(found.outputs(1, True).popitem()[1] for found in (tight, wide)))
    assert passes == [("rms",), "gram"] * 2  # what is at hand is not collected again


# --- other processes ---

LIMIT = 12_000
OTHER = """
    import os, sys
    sys.path[:0] = {path!r}
    from pathlib import Path
    import torch
    from secateur.pruners.calibration.cache import StatisticsCache
    cache = StatisticsCache(Path({directory!r}), {limit})
    print("ready", flush=True)
    with cache.locked("a"):
        print(cache.get("a.x") is not None, flush=True)
    for turn in range(25):
        key = f"{{'pqrst'[turn % 5]}}.x"
        with cache.locked(key[0]):
            found = cache.get(key) or cache.put(key, [{{"x": torch.full((500,), ord(key[0]))}}] * 2)
        assert [int(piece["x"].sum()) for piece in found] == [500 * ord(key[0])] * 2, found

    def pieces():
        yield {{"x": torch.zeros(100)}}
        print("half", flush=True)
        os.kill(os.getpid(), 9)

    sys.stdin.readline()
    with cache.locked("k"):
        cache.put("k.x", pieces())
"""


def test_two_processes_at_once_of_which_one_is_killed_as_it_writes(tmp_path):
    cache = StatisticsCache(tmp_path, LIMIT)
    code = textwrap.dedent(OTHER).format(path=[*filter(None, sys.path)], directory=str(tmp_path), limit=LIMIT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        with cache.locked("a"):
            assert other.stdout.readline() == "ready\n"
            cache.put("a.x", [{"x": torch.zeros(10)}])
        assert other.stdout.readline() == "True\n"  # it waited
        for turn in range(25):
            key = f"{'tsrqp'[turn % 5]}.x"
            with cache.locked(key[0]):
                found = cache.get(key) or cache.put(key, [{"x": torch.full((500,), ord(key[0]))}] * 2)
            assert [int(piece["x"].sum()) for piece in found] == [500 * ord(key[0])] * 2
        other.stdin.write("go\n")
        other.stdin.flush()
        assert other.stdout.readline() == "half\n"
    assert other.returncode == -9
    assert ".fresh-k.x" in entries(tmp_path)
    assert cache.get("k.x") is None
    put(cache, "z.x")  # tidies up
    assert all(name.endswith(".x") and not name.startswith(".") for name in entries(tmp_path))
    assert size(tmp_path) <= LIMIT
    assert len(put(cache, "k.x")) == 2


def test_what_another_process_writes_is_not_tidied_up(tmp_path):
    cache = StatisticsCache(tmp_path, 1 << 20)

    def pieces():
        yield {"x": torch.zeros(10)}
        put(cache, "b.x")
        yield {"x": torch.ones(10)}

    with cache.locked("a"):
        cache.put("a.x", pieces())
    assert entries(tmp_path) == ["a.x", "b.x"]
    assert cache.get("a.x")[1]["x"].sum() == 10


def test_a_spoilt_entry_is_collected_again(tmp_path, passes):
    statistics(tmp_path).prepare(inputs="moments")
    (file,) = tmp_path.glob("*.moments/block-0001*")
    file.write_bytes(file.read_bytes()[:-10])
    again = statistics(tmp_path)
    assert again.inputs(1)
    assert passes == ["moments"] * 2
    assert StatisticsCache(tmp_path, sys.maxsize).get(next(tmp_path.glob("*.moments")).name) is not None


def test_a_collection_that_fails_leaves_nothing(tmp_path):
    cache = StatisticsCache(tmp_path, sys.maxsize)

    def pieces():
        yield {"x": torch.zeros(10)}
        raise ValueError("inputs")

    with cache.locked("a"), pytest.raises(ValueError, match="inputs"):
        cache.put("a.x", pieces())
    assert entries(tmp_path) == []
