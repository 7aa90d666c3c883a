"""Two Ray nodes on this machine, whose processes can be killed: those that were begun here, and no others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PERIOD_S = 0.02
BEGUN: set[int] = set()
"""Sessions of this program's own children: nothing else is ever killed."""
LIMIT_S = 240.0


def members(session: int) -> list[int]:
    """Processes of a session that this one began: all that descend from its first one."""
    found: list[int] = []
    if session not in BEGUN:
        return found
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Processes that a child of this program has begun, and theirs."""
    above: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            above.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
        except OSError:  # ended meanwhile
            continue
    found = list(above.get(pid, ()))
    for child in found:
        found += above.get(child, ())
    return found


def program(pid: int) -> str:
    """Command of a process: its program's name, and its arguments where that is Python."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    name = Path(words[0]).name
    return " ".join([name, *words[1:]]) if name.startswith("python") else name


class Node:
    """What one ``ray start`` starts, in a session of its own.

    Args:
        ip: of this machine's loopback network.
        head: (host, port) of the head.
        directory: for its files; short.
        worker_ports: where its workers listen.
    """

    def __init__(self, ip: str, head: tuple[str, int], directory: Path, worker_ports: range) -> None:
        self._head = ip == head[0]
        place = ["--head", "--port", str(head[1])] if self._head else ["--address", f"{head[0]}:{head[1]}"]
        self._command = [
            *(str(Path(sys.executable).with_name("ray")), "start", *place),
            *("--node-ip-address", ip, "--temp-dir", str(directory), "--num-cpus", "1"),
            *("--min-worker-port", str(worker_ports[0]), "--max-worker-port", str(worker_ports[-1])),
            *("--object-store-memory", str(100 << 20), "--disable-usage-stats"),
            *(["--include-dashboard=false"] if self._head else []),
        ]
        self.session = 0

    def start(self) -> None:
        with tempfile.TemporaryFile("w+") as output:
            starter = subprocess.Popen(
                self._command, start_new_session=True, stdout=output, stderr=subprocess.STDOUT, cwd="/tmp"
            )
            self.session = starter.pid
            BEGUN.add(self.session)
            if starter.wait(timeout=LIMIT_S):
                output.seek(0)
                raise RuntimeError(f"ray start failed:\n{output.read()}")

    @property
    def up(self) -> bool:
        return bool(self._named("raylet"))

    def kill(self, program: str = "") -> None:
        if program:
            kill(self._named(program))
            return
        while left := members(self.session):
            kill(left)
            time.sleep(PERIOD_S)
        BEGUN.discard(self.session)  # the number may be given to others now

    def _named(self, program: str) -> list[int]:
        found = []
        for pid in members(self.session):
            try:
                first = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            if Path(first.decode(errors="replace")).name == program:
                found.append(pid)
        return found


class Cluster:
    """Two nodes."""

    def __init__(self, scratch: Path) -> None:
        with socket.create_server(("127.0.0.2", 0)) as free:
            head = ("127.0.0.2", free.getsockname()[1])
        self.address = f"{head[0]}:{head[1]}"
        self.head = Node("127.0.0.2", head, scratch / "a", range(21000, 21100))
        self.other = Node("127.0.0.3", head, scratch / "b", range(21100, 21200))

    def start(self) -> None:
        """Whatever of it is down; the second node never outlives its head."""
        if not (self.head.up and self.head._named("gcs_server")):
            self.stop()
            self.head.start()
        if not self.other.up:
            self.other.kill()
            self.other.start()

    def stop(self) -> None:
        for node in (self.other, self.head):
            node.kill()
