"""Level stores and statistics whose process was killed: at most one block is run again, and the result is the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur.pruners.calibration import kept_states
from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.calibration.kept_states import KeptStates
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.models.loading import load_model
from secateur.pruners.stores.block_files import LevelStoreError
from secateur.search import app
from tests.streaming import saved
from tests.test_streamed_search import SPACES, settings

N_BLOCKS, KILLED_IN = 5, 3
TOKENS = torch.arange(8 * 32).reshape(8, 32)

KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.pruners.calibration import cache
from secateur.pruners.stores import block_files
from tests import test_killed_walks as of

def killing(save):
    def saving(tensors, directory, block):
        if block == of.KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, directory, block)
    return saving

block_files.save_block = killing(block_files.save_block)
cache.save_block = killing(cache.save_block)
getattr(of, sys.argv[1])(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
"""


def levels(model: str, directory: Path, space: str, stream: str = "always") -> None:
    """Build the level store of a space."""
    of = SPACES | {"formulas": {"kind": "formula", "terminals": ["W", "X", "H"]}}
    further = {"dtype": "bfloat16"} if space == "formulas" else {}
    app.open_session(settings(model, stream, of[space], **further)).build_levels(directory)


def statistics(model: str, directory: Path, detail: str) -> None:
    """Collect the statistics that recipes use."""
    anatomy = load_model(model).dissect()
    made = CalibrationStatistics(anatomy, TOKENS, StatisticsCache(directory, 1 << 30), "a model")
    made.prepare(inputs=detail)


def killed(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Blocks that calibration tokens walk through, in order."""
    seen: list[int] = []
    through = Walk.through
    counted = lambda self, block, *of: (seen.append(block.index), through(self, block, *of))[1]  # noqa: E731
    monkeypatch.setattr(Walk, "through", counted)
    return seen


def files(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(x.relative_to(directory)): load_file(x) for x in sorted(directory.rglob("*.safetensors"))}


def check_same(one: Path, other: Path) -> None:
    before, after = files(one), files(other)
    assert before.keys() == after.keys()
    for name, tensors in before.items():
        assert tensors.keys() == after[name].keys()
        assert all(torch.equal(x, after[name][key]) for key, x in tensors.items()), name


@pytest.mark.parametrize("space", [*SPACES, "formulas"])
def test_a_level_store_goes_on_with_the_block_that_is_missing(tmp_path, runs, space):
    model = saved(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=N_BLOCKS)
    levels(model, tmp_path / "whole", space)
    once = len(runs) // N_BLOCKS  # a block in one build
    runs.clear()
    killed("levels", model, tmp_path / "levels", space)
    assert len(list((tmp_path / "levels").glob("block-*.safetensors"))) == KILLED_IN
    levels(model, tmp_path / "levels", space)
    assert min(runs, default=KILLED_IN) == KILLED_IN
    assert len(runs) == once * (N_BLOCKS - KILLED_IN)
    check_same(tmp_path / "whole", tmp_path / "levels")


@pytest.mark.parametrize("detail", ["moments", "gram"])
def test_so_do_statistics(tmp_path, runs, detail):
    model = saved(tmp_path / "model", "llama", num_hidden_layers=N_BLOCKS)
    statistics(str(model), tmp_path / "whole", detail)
    assert runs == list(range(N_BLOCKS))
    runs.clear()
    killed("statistics", model, tmp_path / "cache", detail)
    statistics(str(model), tmp_path / "cache", detail)
    assert runs == list(range(KILLED_IN, N_BLOCKS))
    check_same(tmp_path / "whole", tmp_path / "cache")


@pytest.mark.parametrize("damage", ["states", "block"])
def test_what_was_damaged_is_computed_again(tmp_path, runs, damage):
    model = saved(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=N_BLOCKS)
    levels(model, tmp_path / "whole", "ranks")
    killed("levels", model, tmp_path / "levels", "ranks")
    runs.clear()
    if damage == "states":
        [path] = (tmp_path / "levels").glob("states-*.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(bytes(content))
    else:
        (tmp_path / "levels" / "block-0001.safetensors").unlink()
    levels(model, tmp_path / "levels", "ranks")
    assert runs[0] == 0
    check_same(tmp_path / "whole", tmp_path / "levels")


def test_states_are_of_one_walk_alone(tmp_path):
    hidden = [torch.ones(2, 4, 3), torch.zeros(1, 4, 3)]
    KeptStates(tmp_path, "one").keep(2, hidden)
    assert KeptStates(tmp_path, "another").before([2]) is None
    assert KeptStates(tmp_path, "one").before([1, 2]) is None
    n_blocks, found = KeptStates(tmp_path, "one").before([2, 3])
    assert n_blocks == 2
    assert [x.tolist() for x in found] == [x.tolist() for x in hidden]
    KeptStates(tmp_path, "one").keep(3, hidden)
    assert [x.name for x in tmp_path.iterdir()] == ["states-0003.safetensors"]


def test_large_states_are_written_where_a_block_takes_longer_than_that(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_states, "SMALL_BYTES", 0)
    now = [0.0]
    monkeypatch.setattr(kept_states.time, "monotonic", lambda: now[0])
    kept = KeptStates(tmp_path, "one")
    save = kept_states.save_tensors

    def slow(*of: object) -> None:
        save(*of)
        now[0] += 1.0

    monkeypatch.setattr(kept_states, "save_tensors", slow)
    there = []
    for n_blocks, seconds in enumerate([0.0, 1.0, 1.0, 2.5, 9.0], 1):
        now[0] += seconds
        kept.keep(n_blocks, [torch.ones(1, 2, 3)])
        there.append(max(int(x.stem[-4:]) for x in tmp_path.iterdir()))
    assert there == [1, 1, 1, 4, 5]


def test_the_disk_needs_room_for_states(tmp_path, monkeypatch):
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    session = app.open_session(settings(model, "always", SPACES["ranks"]))
    of_levels = session.pruner.stored_bytes()
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": of_levels + (1 << 20) + 100})
    )
    with pytest.raises(LevelStoreError, match="Expected 1 MB of room for the level store"):
        session.build_levels(tmp_path / "levels")
    assert not list((tmp_path / "levels").glob("*.safetensors"))
