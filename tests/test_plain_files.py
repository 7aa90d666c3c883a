"""Directories from somebody else: pipes and devices in them are named, not waited for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from secateur.evaluators.latency.store import _read
from secateur.pruners.models.loading import find_checkpoint
from secateur.pruners.recipes.allocation.profile import read_profile
from secateur.search.app import search
from secateur.search.app.recipe_file import read_recipe
from secateur.search.errors import UsageError
from secateur.search.settings.settings import load_settings, settings_from
from secateur.search.study.lock import RunLock
from secateur.spaces.plain_files import check_plain
from tests.runs import make_run


def replace_with(kind: str, path: Path) -> str:
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return f"Expected {path} to be a plain file, got {kind}"


KINDS = ("a pipe", "a device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["measurements.jsonl", "study.json", "settings.yaml", "run.lock", "asks.jsonl"]
)
def test_a_run_with_a_pipe_or_a_device_is_refused_by_every_command(secateur, tmp_path, kind, name):
    run = make_run(tmp_path / "run", 3).study.directory
    said = replace_with(kind, run / name)
    for command in (["front"], ["pick", "--sparsity", "0.3"], ["status"], ["report"]):
        code, _, err = secateur(command[0], run, *command[1:])
        assert code == 2
        assert err.count("\n") == 1
        assert said in err or (name == "study.json" and "Expected a run directory" in err)
    with pytest.raises(ValueError, match="Expected"):
        search(settings_from({"model": "tiny"}), run)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_models_that_are_none_are_refused(tmp_path, kind):
    path = tmp_path / "file.yaml"
    said = replace_with(kind, path)
    for read in (read_profile, read_recipe, _read, load_settings):
        with pytest.raises(ValueError, match="to be a plain file") as raised:
            read(path)
        assert said in str(raised.value)
    model = Path(shutil.copytree(find_checkpoint("tiny").location, tmp_path / "model"))
    said = replace_with(kind, model / "tokenizer_config.json")
    with pytest.raises(ValueError, match="to be a plain file"):
        find_checkpoint(str(model))


def test_missing_files_and_impossible_names_are_for_others_to_name(tmp_path):
    check_plain(tmp_path / "none", tmp_path, tmp_path / "\0", tmp_path / ("x" * 5000))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_plain(tmp_path / "link")


@pytest.mark.parametrize("name", ["run.lock", "search.log", "measurements.jsonl", "study.json.new"])
@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_written_through_a_link_of_somebody_elses_run(tmp_path, name, is_there):
    run = make_run(tmp_path / "run", 3).study.directory
    outside = tmp_path / "outside"
    if is_there:
        outside.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(UsageError, match=f"got a link to {outside}. Remove it: {run / name}"):
        RunLock(run)
    assert (outside.read_text() if outside.exists() else None) == ("mine" if is_there else None)


def test_a_picture_is_not_drawn_through_a_link(secateur, tmp_path):
    run = make_run(tmp_path / "run", 3).study.directory
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run / "report").mkdir()
    (run / "report" / "front.png.new").symlink_to(outside)
    code, _, err = secateur("front", run)
    assert code == 0
    assert f"got a link to {outside}" in err
    code, _, err = secateur("report", run)
    assert code != 0
    assert err.count("\n") == 1
    assert outside.read_text() == "mine"


def test_a_report_is_not_written_into_a_linked_directory(secateur, tmp_path):
    run = make_run(tmp_path / "run", 3).study.directory
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "index.html").write_text("mine")
    shutil.rmtree(run / "report", ignore_errors=True)
    (run / "report").symlink_to(outside)
    code, _, err = secateur("front", run)
    assert code == 0
    assert f"Expected a directory of its own, got a link to {outside}" in err
    code, _, err = secateur("report", run)
    assert code != 0
    assert err.count("\n") == 1
    with pytest.raises(UsageError, match=f"got a link to {outside}. Remove it: {run / 'report'}"):
        RunLock(run)
    assert [path.name for path in outside.iterdir()] == ["index.html"]
    assert (outside / "index.html").read_text() == "mine"
