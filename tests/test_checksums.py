"""Checksums: of measurements, which readers then need not parse, and of stored tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.stores import block_files
from secateur.pruners.stores.block_files import (
    INDEX,
    LevelStoreError,
    StoredBlocks,
    build_store,
    finished_key,
    load_block,
    load_tensors,
    save_block,
    save_tensors,
)
from secateur.pruners.weights.level_store import StoreKey
from secateur.pruners.weights.method import Method
from secateur.search.errors import UsageError
from secateur.search.results.run import Run, open_run
from secateur.search.study.checksum import checksum_path
from secateur.search.study.study import MEASUREMENTS, Study
from secateur.spaces.measurement import Fidelity, Measurement
from tests.runs import make_run
from tests.toy import measurement, start

# --- measurements ---


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run", 6).study.directory


def test_a_reader_parses_the_lines_that_are_not_as_their_driver_wrote_them(run, monkeypatch):
    parsed: list[int] = []
    monkeypatch.setattr(Run, "candidate", lambda self, trial: parsed.append(trial.number))
    n_trials = len(open_run(run).study.trials)
    assert parsed == []  # all are as they were written
    path = run / MEASUREMENTS
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1].replace("test:1024", "test:2048") + "\n")
    open_run(run)
    assert parsed == [n_trials]
    parsed.clear()
    checksum_path(path).unlink()
    open_run(run)
    assert len(parsed) == len({t.measurement.candidate for t in Study.open(run).trials})  # each text once


def test_a_line_that_nobody_shows_is_named_by_every_command(secateur, run):
    worst = Measurement("zz", Fidelity("search", 1024), infeasible="none of the space", worker="w")
    path = run / MEASUREMENTS
    with path.open("a") as file:
        file.write(json.dumps(worst.to_json()) + "\n")
    n_lines = path.read_text().count("\n")
    for command in (["front"], ["pick", "--sparsity", "0.3"], ["status"], ["report"]):
        code, _, err = secateur(command[0], run, *command[1:])
        assert code == 2
        assert f"in line {n_lines} of {path}, got 'zz'" in err


def test_the_checksum_covers_what_drivers_wrote_one_after_the_other(tmp_path):
    path = tmp_path / MEASUREMENTS
    for number in range(3):
        with start(tmp_path) as study:
            study.append([measurement(number)])
        assert Study.open(tmp_path).n_unchanged == number + 1
    data, further = path.read_bytes(), json.dumps(measurement(7).to_json()).encode() + b"\n"
    for content, n_unchanged in (
        (data + further, 3),
        (data[:-1], 0),
        (data.replace(b"c1", b"c7"), 0),
        (data, 3),
    ):
        path.write_bytes(content)
        assert Study.open(tmp_path).n_unchanged == n_unchanged
    with start(tmp_path) as study, path.open("ab"):
        assert study.n_unchanged == 3


@pytest.mark.parametrize(
    "content", ["", "[]", '{"bytes": 1e9, "sha256": 3}', '{"bytes": -1, "sha256": ""}', "\xff"]
)
def test_a_damaged_checksum_is_none(run, content):
    checksum_path(run / MEASUREMENTS).write_text(content)
    assert open_run(run).study.n_unchanged == 0


def test_a_text_of_endless_runs_is_refused_at_once(run):
    view = open_run(run)
    for text in (
        "allocation:" + ",".join(["1x999999", "2x999999"] * 500),
        "allocation:1x1",
        "allocation:01x6",
    ):
        with pytest.raises(ValueError, match="Expected an allocation such as"):
            view.space.parse(text)
    with pytest.raises(UsageError):
        open_run(run / "nowhere")


# --- stored tensors ---


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


TENSORS = {
    "w": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "n": torch.tensor(3.0),
    "m": torch.tensor([True]),
}


def test_a_flipped_bit_of_a_stored_block_is_found_at_its_first_use(tmp_path):
    for index in range(2):
        save_block(TENSORS, tmp_path, index)
    path = tmp_path / "block-0001.safetensors"
    whole, n_bytes = path.read_bytes(), path.stat().st_size
    for at in range(header_end(path), n_bytes):  # every byte of the tensors
        flip(path, at, at % 8)
        blocks = StoredBlocks(tmp_path, 2)
        assert torch.equal(blocks[0]["w"], TENSORS["w"])
        with pytest.raises(LevelStoreError, match=r"block-0001.*is damaged. Delete its directory"):
            blocks[1]
        path.write_bytes(whole)
    assert StoredBlocks(tmp_path, 2)[1]["n"] == 3.0


def test_a_flipped_bit_of_the_header_is_no_other_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, "who")
    whole = path.read_bytes()
    for at in range(header_end(path)):
        for bit in range(8):
            flip(path, at, bit)
            found = load_tensors(path, "who")
            assert found is None or all(torch.equal(found[name], x) for name, x in TENSORS.items())
            path.write_bytes(whole)
    assert load_tensors(path, "who") is not None
    assert load_tensors(path, "another") is None


def test_stores_of_earlier_versions_without_checksums_are_read(tmp_path):
    save_file(dict(TENSORS), tmp_path / "block-0000.safetensors")
    assert torch.equal(StoredBlocks(tmp_path, 1)[0]["w"], TENSORS["w"])
    assert load_block(tmp_path, 0).keys() == TENSORS.keys()


def test_damaged_statistics_are_missing_and_collected_again(tmp_path):
    cache = StatisticsCache(tmp_path, 1 << 20)
    with cache.locked("g"):
        cache.put("g.moments", [TENSORS])
    assert cache.get("g.moments") is not None
    (path,) = (tmp_path / "g.moments").iterdir()
    flip(path, path.stat().st_size - 1, 0)
    assert cache.get("g.moments") is None


def test_a_file_is_hashed_once_in_a_process(tmp_path, monkeypatch):
    save_block(TENSORS, tmp_path, 0)
    hashed: list[int] = []
    monkeypatch.setattr(block_files, "_tensors_sha256", lambda tensors: hashed.append(1) or "")
    load_block(tmp_path, 0)  # just written
    assert hashed == []
    monkeypatch.setattr(block_files, "_checked", set())
    for _ in range(2):
        with pytest.raises(LevelStoreError):
            load_block(tmp_path, 0)
    assert len(hashed) == 2
    monkeypatch.undo()
    monkeypatch.setattr(block_files, "_checked", set())
    assert load_block(tmp_path, 0).keys() == TENSORS.keys()
    assert len(block_files._checked) == 1


@pytest.mark.parametrize("damage", [None, {}, [], {"levels": [0.0, 0.6], "model": "another"}])
def test_an_index_whose_key_was_changed_is_no_store(tmp_path, damage):
    key = StoreKey("model", "float32", "tokens", Method("wanda"), (0.0, 0.5))
    build_store(tmp_path, key, 0, lambda missing: 0, lambda missing: (), otherwise="", on_block=print)
    assert finished_key(tmp_path) == json.loads(json.dumps(key.record))
    path = tmp_path / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"key": damage}))
    assert finished_key(tmp_path) is None
