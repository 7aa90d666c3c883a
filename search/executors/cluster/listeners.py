"""Sockets that the processes of Ray and of this program listen to on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.search.executors.cluster.lazy_ray import token_source

RAY = ("gcs_server", "raylet", "ray::", "dashboard", "runtime_env", "log_monitor", "plasma_store")
LISTENS = "0A"  # state in /proc/net/tcp


@dataclass(frozen=True)
class Listener:
    """A socket that a process listens to.

    Args:
        process: its name and number.
        host: address; 0.0.0.0 or :: for all of the machine's.
        port: number.
    """

    process: str
    host: str
    port: int

    @property
    def is_open(self) -> bool:
        """True if other machines may reach it."""
        return not ipaddress.ip_address(self.host).is_loopback


def examine_cluster(proc: Path = Path("/proc")) -> list[tuple[str, str, bool | None]]:
    """Name, state and verdict for the token and for each socket of Ray on this machine; see `doctor --cluster`.

    A socket for other machines is in order with a token alone: whoever reaches Ray without one may run code.
    """
    token, found = token_source(), sorted(listeners(proc), key=lambda x: (not x.is_open, x.process, x.port))
    state = f"from {token}" if token else "none: whoever reaches these sockets may run code as this user"
    rows: list[tuple[str, str, bool | None]] = [("token", state, None)]
    if not found:
        return [*rows, ("ray", "no process of it listens on this machine", None)]
    for one in found:
        reach = "other machines may reach it" if one.is_open else "this machine alone"
        rows.append(
            (one.process, f"{one.host}:{one.port}, {reach}", (token is not None) if one.is_open else True)
        )
    return rows


def listeners(proc: Path = Path("/proc")) -> Iterator[Listener]:
    """Sockets of Ray's processes, as far as this user may see them; needs Linux."""
    sockets = dict(_sockets(proc))
    for directory in sorted(proc.glob("[0-9]*")):
        name = _name(directory)
        if not name.startswith(RAY):
            continue
        try:
            links = [str(link.readlink()) for link in (directory / "fd").iterdir()]
        except OSError:  # ended, or another user's
            continue
        for inode in {link[8:-1] for link in links if link.startswith("socket:[")} & sockets.keys():
            yield Listener(f"{name} {directory.name}", *sockets[inode])


def _name(directory: Path) -> str:
    """Name of a process: that of its program, or what it calls itself; for Python, of its script."""
    try:
        words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    scripts = [Path(word).name for word in words[1:4] if word.endswith(".py")]
    first = words[0] if words[0].startswith("ray::") else Path(words[0]).name
    if first.startswith("python") and scripts:
        return (
            "dashboard agent" if "agent" in words[-1] + scripts[0] and "dashboard" in words[1] else scripts[0]
        )
    return first


def _sockets(proc: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Host and port of each listening socket, by its inode."""
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in (line.split() for line in lines):
            if fields[3] == LISTENS:
                host, _, port = fields[1].partition(":")
                yield fields[9], (_address(host), int(port, 16))


def _address(digits: str) -> str:
    """Address from the kernel's form: words of 32 bits, in the byte order of the machine."""
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)
