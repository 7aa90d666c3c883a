"""Streamed pruning after a kill, a stop or a full disk: it goes on from what is whole and its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.pruners.export import streamed
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.export.saving import leftovers, unfinished
from secateur.search import app
from secateur.search.cli.doctor_directory import examine_export
from tests.streaming import FEW, Stopped, check_equal, recipe, saved, saving, stop, tensors

KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.pruners.export import streamed
from secateur.search import app
from tests.streaming import FEW, recipe, saving

streamed.save_file = saving(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
app.prune(recipe(), sys.argv[1], Path(sys.argv[2]), **FEW, stream="always")
"""


@pytest.mark.usefixtures("forked_reload")
def test_a_killed_prune_computes_one_block_again(tmp_path):
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(to)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not to.exists()
    assert leftovers(tmp_path, "pruned") == [unfinished(to)]
    first = tensors(unfinished(to) / "model")
    assert not any(name.startswith("model.layers.1.") for name in first)
    said: list[str] = []
    app.prune(recipe(), str(model), to, **FEW, stream="always", say=said.append)
    assert [x for x in said if x.startswith("pruning")] == ["pruning block 2/3", "pruning block 3/3"]
    assert "going on after block 1/3 of an earlier start" in said
    app.prune(recipe(), str(model), tmp_path / "whole", **FEW, stream="never")
    check_equal(tmp_path / "whole", to)
    assert not leftovers(tmp_path, "pruned")


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model, and the destination of a streamed prune that was stopped at its last block."""
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "save_file", saving(2, stop))
        with pytest.raises(Stopped):
            app.prune(recipe(), str(model), to, **FEW, stream="always")
    return model, to


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("damage", ["shard", "states", "another recipe"])
def test_what_is_left_is_used_only_if_it_is_whole_and_of_this_prune(tmp_path, monkeypatch, damage):
    model, to = begun(tmp_path, monkeypatch)
    sparsity = 0.25 if damage == "another recipe" else 0.5
    paths = {"shard": unfinished(to) / "model", "states": unfinished(to)}
    if damage in paths:
        path = max(paths[damage].glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(bytes(content))
    said: list[str] = []
    app.prune(recipe(sparsity=sparsity), str(model), to, **FEW, stream="always", say=said.append)
    assert "pruning block 1/3" in said
    manifest = json.loads((to / MANIFEST).read_text())
    assert sum(manifest["zeros"].values()) == pytest.approx(
        sparsity * sum(manifest["weights"].values()), rel=0.01
    )


@pytest.mark.usefixtures("forked_reload")
def test_an_unfinished_export_is_named_and_another_kind_removes_it(tmp_path, monkeypatch):
    model, to = begun(tmp_path, monkeypatch)
    beside = tmp_path / "other"
    app.prune(recipe(), str(model), beside, **FEW, stream="never")
    unfinished(to).rename(unfinished(beside))
    assert any(".other-streamed" in x.found and "goes on from it" in x.found for x in examine_export(beside))
    summary = app.prune(recipe(), str(model), beside, **FEW, stream="never")
    assert summary.already
    assert summary.removed == [str(unfinished(beside))]


def test_a_full_disk_leaves_what_is_done_for_the_next_start(tmp_path, monkeypatch):
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "save_file", saving(1, full))
    with pytest.raises(ExportError, match="No space left on device"):
        app.prune(recipe(), str(model), to, **FEW, stream="always")
    assert not to.exists()
    assert json.loads((unfinished(to) / streamed.PROGRESS).read_text())["n_blocks"] == 1
