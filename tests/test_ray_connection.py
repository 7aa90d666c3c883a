"""What is said where no cluster answers, or another one than it should."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from secateur.search.errors import UsageError
from secateur.search.executors.cluster import connection, lazy_ray, watchdog
from secateur.search.executors.cluster.connection import connect
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.recovery import tuning


class NotConnected:
    """Ray as it is before anything is connected."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: object) -> None:
        assert self._error is not None, "nobody listens: Ray must not be asked"
        raise self._error


def refused(monkeypatch, ray: NotConnected, address: str) -> str:
    monkeypatch.setattr(connection, "load_ray", lambda: ray)
    with pytest.raises(UsageError) as caught:
        connect(RaySettings(address=address))
    return str(caught.value)


def test_an_address_where_nobody_listens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = refused(monkeypatch, NotConnected(), f"127.0.0.1:{port}")
    assert f"`executor.address` 127.0.0.1:{port}, got: [Errno 111] Connection refused" in said
    assert f"`ray start --head --port {port}`" in said


def test_a_cluster_that_does_not_let_this_machine_in(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    failed = ConnectionError("Failed to connect to Ray cluster")
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = refused(monkeypatch, NotConnected(failed), f"127.0.0.1:{server.getsockname()[1]}")
    assert "got none (Failed to connect to Ray cluster). Set RAY_AUTH_MODE (here: disabled)" in said
    assert "~/.ray/auth_token" in said


def test_a_token_is_known_before_any_part_of_ray_is_imported(monkeypatch, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setattr(lazy_ray.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "to be put back")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(tuning.importlib, "import_module", lambda name: os.environ.get("RAY_AUTH_MODE"))
    assert tuning._tune() == "token"  # Ray's own head demands it then


def test_a_machine_that_is_in_no_cluster(monkeypatch):
    said = refused(
        monkeypatch, NotConnected(ConnectionError("Could not find any running Ray instance.")), "auto"
    )
    assert "got none (Could not find any running Ray instance.). Start one with `ray start --head`" in said


def test_another_version_of_ray(monkeypatch):
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0\n    Python: 3.11")
    said = refused(monkeypatch, NotConnected(error), "auto")
    assert "started with: Ray: 2.0 Python: 3.11 Install the same ones here and there." in said


class Connects:
    """Ray with two CPUs, at one address."""

    def __init__(self, address: str, *, initialized: bool = False) -> None:
        self._address = address
        self._initialized = initialized

    def is_initialized(self) -> bool:
        return self._initialized

    def init(self, **options: object) -> None:
        self._initialized = True

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address=self._address)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def test_only_a_ray_of_our_own_has_no_nodes_of_others(monkeypatch):
    monkeypatch.setattr(connection, "_started", set())
    ray = Connects("here:1")
    monkeypatch.setattr(connection, "load_ray", lambda: ray)
    first, second = connect(RaySettings()), connect(RaySettings())  # before a search, and by its executor
    assert (first.joined, first.ours) == (False, True)
    assert (second.joined, second.ours) == (False, False)
    monkeypatch.setattr(connection, "load_ray", lambda: Connects("there:1", initialized=True))
    assert connect(RaySettings()).joined, "a caller may have joined any cluster before"


@pytest.mark.parametrize("remedy", [None, "Continue with: secateur search s.yaml"])
def test_a_raylet_that_is_gone_is_said_before_ray_ends_its_driver(monkeypatch, remedy):
    monkeypatch.setattr(watchdog.Watchdog, "PERIOD_S", 0.02)
    monkeypatch.setattr(watchdog, "OWN_PATIENCE_S", 0.05)
    monkeypatch.setattr(watchdog, "NOTE_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: ended.set())
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as head, socket.create_server(("127.0.0.1", 0)) as raylet:
        places = {watchdog.HEAD: head.getsockname(), watchdog.OWN: raylet.getsockname()}
        raylet.close()
        own = {} if remedy is None else {"remedy": remedy}  # where Ray is our own
        watchdog.Watchdog(places, said.append, grace_s=0.2, **own)
        assert ended.wait(10)
    assert len(said) == 1
    assert (
        f"gone: this node's raylet at 127.0.0.1:{places[watchdog.OWN][1]} does not answer any more."
        in said[0]
    )
    assert said[0].endswith(remedy or "the same command continues.")


OWN = """
import os, socket
from secateur.search.executors.cluster.connection import connect, disconnect
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.watchdog import places

connection, found = connect(RaySettings(workers=1)), []
for host, port in places().values():
    socket.create_connection((host, port), timeout=5).close()
    with socket.socket() as other:  # answers only what listens to all addresses
        found.append((host, other.connect_ex(("127.0.0.2", port)) == 0))
disconnect(connection)
print(found, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is an address of Linux alone")
def test_a_ray_of_our_own_listens_to_this_machine_alone():
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", OWN], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["[('127.0.0.1', False), ('127.0.0.1', False)] False"], (
        done.stderr
    )
