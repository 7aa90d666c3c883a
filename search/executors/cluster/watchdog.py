"""Notices that the cluster is gone, which Ray's own calls may never tell."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from secateur.search.executor import ExecutorError
from secateur.search.executors.cluster.lazy_ray import load_ray

Place = tuple[str, int]

HEAD, OWN = "the head", "this node's raylet"

OWN_PATIENCE_S = 3.0
"""A raylet is never started again in its place, and some 10 s after it Ray ends its driver without a word."""

NOTE_S = 3.0
"""The main thread, where it does not hang, takes note within this time."""

REMEDY = "All finished measurements are safe. Start the cluster again; then the same command continues."


class ClusterLostError(ExecutorError):
    """There is no Ray any more: whatever would be asked of it may hang."""


class Watchdog:
    """Looks every few seconds whether the head of the cluster and this node's own daemon still listen.

    Without the head Ray ends its driver after a minute; without the node's daemon a driver hangs or is ended. The
    watchdog says so before: `lost` is set, and where nobody takes note of it, since the main thread hangs in a call, it
    is told; after a grace period the process is ended with status 1. Nothing is lost by that: measurements are on the
    disk.

    Args:
        places: (host, port) of what must listen, by its name.
        say: told what is going on, once.
        patience_s: how long one of them may be silent; of this node's raylet at most `OWN_PATIENCE_S`.
        grace_s: how long the process has to end by itself.
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
            if any(now - last > self._patience_with(name) for name, last in heard.items()):
                self.lost = self._describe([name for name, last in heard.items() if last < now])
                break
        if self.lost is None:
            return
        if not self._ended.wait(min(NOTE_S, self._grace)) and not self.noted:
            self._say(f"The Ray cluster is gone: {self.lost}. {REMEDY}")
            sys.stderr.flush()
        if not self._ended.wait(self._grace):
            os._exit(1)

    def _patience_with(self, name: str) -> float:
        return min(self._patience, OWN_PATIENCE_S) if name == OWN else self._patience

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
    found = {HEAD: (host, int(port))}
    for node in ray.nodes():
        if node["NodeID"] == own:
            found[OWN] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return found
