"""The directory of an export: refused if in use, whole or not there, and freed of what killed exports left."""

import resource
import signal
import socket
import subprocess
import sys

import pytest

from secateur.pruners.export import saving
from secateur.pruners.export.export_check import ExportError
from tests.exports import export, leftovers, llama, prune


def test_destinations_in_use_are_refused(tmp_path):
    model = llama(tied=True)
    manifest = prune(model)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="Expected a new or empty directory"):
        export(model, tmp_path / "used", manifest)
    with pytest.raises(ValueError, match="a file"):
        export(model, tmp_path / "used" / "thesis.tex", manifest)
    assert leftovers(tmp_path) == ["used"]
    assert leftovers(tmp_path / "used") == ["thesis.tex"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    model = llama(tied=True)
    manifest = prune(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A real error from the system, as of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"Expected to write the model to .*Free some space") as caught:
            export(model, tmp_path / "out", manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    model = llama(tied=True)
    monkeypatch.setattr(saving, "SPARE_BYTES", 1 << 62)
    with pytest.raises(ExportError, match="MB of free space"):
        export(model, tmp_path / "out", prune(model))
    assert leftovers(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.pruners.export.saving import new_directory

with new_directory(Path(sys.argv[1]), 1) as (made, scratch):
    (made / "model.safetensors").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_exports_left_is_removed_and_nothing_else(tmp_path):
    out = tmp_path / "out[1]"
    assert saving.remove_leftovers(out) == []
    killed = subprocess.run([sys.executable, "-c", KILLED, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    [left] = leftovers(tmp_path)
    kept = {}
    for name, host in {
        ".out[1]-of_other": "another-host",
        ".out[1]-starting": "",
        ".out[1]-other-abcdefgh": socket.gethostname(),
        "out[1]-12345678": socket.gethostname(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / saving.LOCK).write_text(host)
        kept[name] = host
    (tmp_path / ".out[1]-unmarked").mkdir()
    with saving.new_directory(out, 1) as (made, scratch):
        assert saving.remove_leftovers(out) == [str(tmp_path / left)]
        assert {*leftovers(tmp_path)} == {*kept, ".out[1]-unmarked", scratch.name}, "of a living process"
        (made / "weights").write_text("x")
    assert leftovers(out) == ["weights"]
    assert saving.remove_leftovers(out) == []


def test_the_second_of_two_exports_at_once_is_told_so(tmp_path):
    out = tmp_path / "out"

    def both():
        with saving.new_directory(out, 1):
            out.mkdir()
            (out / "weights").write_text("of the first")

    with pytest.raises(ExportError, match=r"another process that exported there meanwhile. Repeat") as caught:
        both()
    assert "\n" not in str(caught.value)
    assert "space" not in str(caught.value)
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(out) == ["weights"]
