"""Notices that the cluster is gone, which Ray's own calls may never tell."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from secateur.search.executors.cluster.library import load_ray

Place = tuple[str, int]

REMEDY = "All finished measurements are safe. Start the cluster again; then the same command continues."


class Watchdog:
    """Looks every few seconds whether the head of the cluster and this node's own daemon still listen.

    Without the head Ray ends its driver after a minute; without the node's daemon a driver hangs for ever. The
    watchdog says so before: `lost` is set, and where nobody has taken note of it after a grace period, since the main
    thread hangs in a call, the process is ended with status 1. Nothing is lost by that: measurements are on the disk.

    Args:
        places: (host, port) of what must listen, by its name.
        say: told what is going on, once.
        patience_s: how long one of them may be silent.
        grace_s: how long the main thread has to take note.
    """

    PERIOD_S = 2.0

    def __init__(
        self,
        places: dict[str, Place],
        say: Callable[[str], None],
        patience_s: float = 20.0,
        grace_s: float = 15.0,
    ) -> None:
        self.lost: str | None = None
        self.noted = False  # somebody else says so
        self._places = places
        self._say = say
        self._patience = patience_s
        self._grace = grace_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking. May be called twice."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        heard = dict.fromkeys(self._places, time.monotonic())
        while not self._ended.wait(self.PERIOD_S):
            now = time.monotonic()
            heard |= dict.fromkeys(self._listening(), now)
            if any(now - last > self._patience for last in heard.values()):
                self.lost = self._describe([name for name, last in heard.items() if last < now])
                break
        if self.lost is not None and not self._ended.wait(self._grace):
            if not self.noted:
                self._say(f"The Ray cluster is gone: {self.lost}. {REMEDY}")
                sys.stderr.flush()
            os._exit(1)

    def _describe(self, silent: Sequence[str]) -> str:
        which = " and ".join(f"{name} at {':'.join(map(str, self._places[name]))}" for name in silent)
        return f"{which} {'does' if len(silent) == 1 else 'do'} not answer any more"

    def _listening(self) -> Sequence[str]:
        found = []
        for name, place in self._places.items():
            try:
                socket.create_connection(place, timeout=self.PERIOD_S).close()
            except OSError:
                continue
            found.append(name)
        return found


def places() -> dict[str, Place]:
    """The head of the cluster and the daemon of this node, as Ray knows them."""
    ray = load_ray()

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    own = ray.get_runtime_context().get_node_id()
    found = {"the head": (host, int(port))}
    for node in ray.nodes():
        if node["NodeID"] == own:
            found["this node's raylet"] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return found
