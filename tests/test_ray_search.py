"""Searches on the embedded model over Ray workers: equal to the local ones, and nothing lost when something dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.search import app
from secateur.search.settings.settings import settings_from
from secateur.search.study.study import Study
from tests.test_app import EVALUATOR, lines

SETTINGS = {
    "space": {"metric": "wanda", "granularity": "sublayer", "target": 0.6},
    "controller": {"kind": "evolution", "offspring": 4},
    "evaluator": EVALUATOR,
    "objectives": ["loss"],
    "budget": {"evaluations": 24},
}
DETERMINISTIC = {"kind": "ray", "deterministic": True}
DRIVER = """
import sys
from pathlib import Path
from secateur.search import app
from secateur.search.settings.settings import load_settings
app.search(load_settings(sys.argv[1], sys.argv[3:]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "levels"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process as in the workers: sums are of the same order then."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(directory: Path, executor: dict, levels: Path, **changes) -> Path:
    settings = settings_from({**SETTINGS, **changes, "executor": executor})
    app.search(settings, directory, levels=levels)
    return directory


def test_the_same_seed_gives_the_same_trials_locally_and_over_one_and_two_workers(
    tmp_path, ray_cluster, levels
):
    local = lines(search(tmp_path / "local", {"kind": "local", "threads": 1}, levels))
    assert len(local) >= 24
    for n in (1, 2):
        found = search(tmp_path / str(n), {**DETERMINISTIC, "workers": n}, levels)
        assert lines(found)[:24] == local[:24]
        key = lambda line: (line["candidate"], line["fidelity"])  # noqa: E731
        assert sorted(lines(found)[24:], key=key) == sorted(local[24:], key=key)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def n_lines(directory: Path) -> int:
    path = directory / "measurements.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_driver(directory: Path, cluster: str, n_evaluations: int) -> subprocess.Popen[bytes]:
    """The search in a process of its own, over two workers, asynchronous."""
    settings = directory.with_suffix(".yaml")
    settings.write_text(json.dumps(SETTINGS))
    words = ["executor.kind=ray", "executor.workers=2", f"executor.address={cluster}"]
    words += ["executor.cpus_per_worker=0.5", f"budget.evaluations={n_evaluations}"]
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(settings), str(directory), *words])


def check(directory: Path, n_evaluations: int, before: bytes) -> None:
    """Nothing lost, nothing twice, as many trials as asked for."""
    assert (directory / "measurements.jsonl").read_bytes().startswith(before)
    keys = [trial.measurement.key for trial in Study.open(directory).trials]
    assert len(set(keys)) == len(keys)
    assert sum(fidelity.startswith("search") for _, fidelity in keys) == n_evaluations


def whole_lines(directory: Path) -> bytes:
    measured = (directory / "measurements.jsonl").read_bytes()
    return measured[: measured.rindex(b"\n") + 1]


def test_killing_the_driver_and_then_a_worker_loses_and_repeats_nothing(tmp_path, ray_cluster):
    directory, n = tmp_path / "run", 100
    driver = start_driver(directory, ray_cluster, n)
    wait_for(lambda: n_lines(directory) > 20 or driver.poll() is not None)
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    before = whole_lines(directory)
    n_before = before.count(b"\n")
    assert n_before < n
    driver = start_driver(directory, ray_cluster, n)
    wait_for(lambda: n_lines(directory) > n_before + 10 or driver.poll() is not None)
    assert driver.poll() is None
    measured = whole_lines(directory)
    assert measured.startswith(before)
    worker = json.loads(measured.splitlines()[-1])["worker"]
    os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
    assert driver.wait(180) == 0
    check(directory, n, measured)
    shutil.rmtree(directory)
