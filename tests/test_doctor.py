"""`doctor` on this machine, runs, exports and clusters."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.pruners.export.manifest import MANIFEST, check_files
from secateur.pruners.stores.block_files import INDEX, save_block
from secateur.search.cli.doctor import examine
from secateur.search.executors.cluster.listeners import Listener, _address, examine_cluster, listeners
from secateur.search.study.repair import ASIDE
from secateur.search.study.study import MEASUREMENTS
from tests.runs import make_run


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run", 6).study.directory


def change(path: Path, number: int, line: bytes) -> bytes:
    lines = path.read_bytes().split(b"\n")
    old, lines[number - 1] = lines[number - 1], line
    path.write_bytes(b"\n".join(lines))
    return old


def test_bad_lines_are_set_aside_and_the_others_stay_as_they_were(secateur, run):
    path = run / MEASUREMENTS
    n_lines = path.read_bytes().count(b"\n")
    bad = {
        2: b'{"candidate": "zz", "fidelity": "search:2048", "values": {"loss": 0.001}}',
        4: b"\xff\x00 no JSON",
        5: b'{"candidate": "zz", "fidelity": "search:1024", "infeasible": "twice"}',
    }
    for number, line in bad.items():
        change(path, number, line)
    before = path.read_bytes().split(b"\n")
    code, out, _ = secateur("doctor", run)
    assert code == 1
    assert [int(x) for x in re.findall(r"^  line (\d+) +BAD ", out, re.MULTILINE)] == list(bad)
    assert "3 lines can't be used" in out
    assert path.read_bytes().split(b"\n") == before  # only looked at
    code, out, _ = secateur("doctor", run, "--repair", "--json")
    assert code == 0
    found = {check["name"]: check["found"] for check in json.loads(out)}
    assert found["set aside"] == f"3 lines, to {run / ASIDE}"
    assert found["measurements"].startswith(f"{n_lines - 3} that can be used")
    assert (run / ASIDE).read_bytes() == b"".join(line + b"\n" for line in bad.values())
    assert path.read_bytes().split(b"\n") == [x for i, x in enumerate(before, 1) if i not in bad]
    assert secateur("doctor", run)[0] == 0
    assert secateur("status", run)[0] == 0


def test_a_run_that_is_being_written_is_not_repaired(secateur, run):
    change(run / MEASUREMENTS, 2, b"{}")
    before = (run / MEASUREMENTS).read_bytes()
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time; from pathlib import Path; from secateur.search.study.lock import RunLock;"
            "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)",
            str(run),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, err = secateur("doctor", run, "--repair")
    finally:
        holder.kill()
        holder.communicate()
    assert code == 4
    assert f"process {holder.pid} on {socket.gethostname()}" in err
    assert (run / MEASUREMENTS).read_bytes() == before
    assert not (run / ASIDE).exists()


def test_damaged_levels_exports_and_rests_of_killed_ones_are_named(secateur, run):
    levels, model, left = run / "levels", run / "model", run / ".model-abcd1234"
    for directory in (levels, model, left):
        directory.mkdir()
    (levels / INDEX).write_text("{}")
    save_block({"w": torch.arange(8)}, levels, 0)
    (model / "a.txt").write_text("as exported")
    files = {"a.txt": {"size_bytes": 11, "sha256": "0" * 64}}
    empty: dict[str, object] = {key: {} for key in ("method", "asked", "calibration", "seeds", "measured")}
    manifest = {**empty, "parent": "p", "fingerprint": "f", "candidate": "", "label": "", "files": files}
    (model / MANIFEST).write_text(json.dumps(manifest))
    (left / "export.lock").write_text(f"{socket.gethostname()}\n")
    code, out, _ = secateur("doctor", run)
    assert code == 1
    assert "levels        ok   1 blocks" in out
    assert "a.txt missing or damaged" in out
    assert f"{left}, of a killed export" in out
    block = levels / "block-0000.safetensors"
    block.write_bytes(block.read_bytes()[:-1] + b"\x01")
    assert "block-0000.safetensors, got others: the file is damaged" in secateur("doctor", run)[1]
    code, out, _ = secateur("doctor", model)
    assert code == 1
    assert str(left) in out
    with (left / "export.lock").open("r+") as lock:  # its process lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert str(left) not in secateur("doctor", model)[1]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x"])
def test_a_manifest_may_not_name_files_elsewhere(run, name):
    empty: dict[str, object] = {key: {} for key in ("method", "asked", "calibration", "seeds", "measured")}
    manifest = {**empty, "parent": "p", "fingerprint": "f", "candidate": "", "label": "", "files": {name: {}}}
    (run / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="Expected files within"):
        check_files(run)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "null", '{"files": [1]}', '{"parent": 3}', '{"seeds": {"a": "x"}}', "\x00"]
)
def test_a_damaged_manifest_is_none(run, text):
    (run / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="Expected an export with its"):
        check_files(run)


def test_repairs_are_of_runs_alone(secateur, tmp_path):
    for words in ((), (tmp_path,)):
        code, _, err = secateur("doctor", *words, "--repair")
        assert code == 2
        assert "Expected a run directory with `--repair`, got" in err


# --- this machine ---


def test_doctor_finds_what_is_broken(tmp_path):
    def damaged():
        raise ValueError("Expected a whole file, got half of one.")

    checks = {
        check.name: check for check in examine(tmp_path / "new" / "cache", lambda: "2 threads", damaged)
    }
    assert checks["model tiny"].ok is False
    assert checks["torch sees"].found == "2 threads"
    assert all(checks[name].ok for name in ("secateur", "torch", "optuna", "pyyaml", "typer"))
    assert checks["cache"].ok is True
    assert not (tmp_path / "new").exists()


def test_doctor_finds_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    checks = {check.name: check for check in examine(tmp_path, str, str)}
    assert checks["cache"].ok is False
    assert "SECATEUR_CACHE" in checks["cache"].found


# --- clusters ---


def test_sockets_of_ray_are_shown_with_their_reach_and_others_are_not():
    """A process that calls itself as Ray's do, and one that does not."""
    script = (
        "import socket, sys, time; s = socket.socket(); s.bind((sys.argv[1], 0)); s.listen();"
        "print(s.getsockname()[1], flush=True); time.sleep(600)"
    )
    made = [("ray::Worker", "127.0.0.1"), ("gcs_server", "0.0.0.0"), ("python", "127.0.0.1")]
    processes = [
        subprocess.Popen(
            [name, "-c", script, host], executable=sys.executable, stdout=subprocess.PIPE, text=True
        )
        for name, host in made
    ]
    try:
        ports = [int(process.stdout.readline()) for process in processes if process.stdout is not None]
        names = [f"{name} {process.pid}" for (name, _), process in zip(made, processes, strict=True)]
        found = list(listeners())
        assert Listener(names[0], "127.0.0.1", ports[0]) in found
        assert Listener(names[1], "0.0.0.0", ports[1]) in found
        assert ports[2] not in {one.port for one in found}
        assert not Listener(names[0], "127.0.0.1", ports[0]).is_open
        rows = {row[0]: row for row in examine_cluster()}
        assert rows[names[0]][1:] == (f"127.0.0.1:{ports[0]}, this machine alone", True)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("token", [None, "secret"])
def test_an_open_socket_without_a_token_is_bad(secateur, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setattr(
        "secateur.search.executors.cluster.listeners.listeners",
        lambda proc: iter([Listener("raylet 7", "0.0.0.0", 6379)]),
    )
    code, out, err = secateur("doctor", "--cluster")
    assert code == (1 if token is None else 0)
    assert "0.0.0.0:6379, other machines may reach it" in out
    assert "secret" not in out + err
    assert "$RAY_AUTH_TOKEN" in out or token is None


def test_addresses_of_the_kernel():
    assert _address("0100007F") == "127.0.0.1"
    assert _address("00000000") == "0.0.0.0"
    assert _address("00000000000000000000000001000000") == "::1"
    assert _address("0000000000000000FFFF00000100007F") == "127.0.0.1"  # of IPv4, in IPv6's table
