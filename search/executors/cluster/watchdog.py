"""Watchdog for a lost cluster, in which calls of Ray may hang for ever."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from secateur.search.executor import ExecutorError
from secateur.search.executors.cluster.lazy_ray import load_ray

Place = tuple[str, int]

HEAD, OWN = "the head", "this node's raylet"

OWN_PATIENCE_S = 3.0
"""Longest silence of this node's raylet: a dead one is not restarted, and some 10 s later Ray ends the driver without a
message."""

NOTE_S = 3.0
"""Time within which the main thread reports the loss, unless it hangs."""

SAFE = "All finished measurements are safe."
REMEDY = f"{SAFE} Start the cluster again; then the same command continues."


class ClusterLostError(ExecutorError):
    """Loss of the Ray cluster; further calls of Ray may hang."""


class Watchdog:
    """Thread that checks every few seconds whether the cluster's head and this node's raylet still listen.

    Without the head Ray ends its driver after a minute; without the raylet a driver hangs or is ended. The watchdog is
    faster: it sets `lost`, reports the loss itself if the main thread hangs in a call of Ray, and after a grace period
    ends the process with status 1. No measurement is lost: all are on disk.

    Args:
        places: (host, port) to check, by name.
        say: receives one message about the loss.
        patience_s: longest silence of a place; for this node's raylet at most `OWN_PATIENCE_S`.
        grace_s: time for the process to end by itself.
        remedy: advice at the message's end.
    """

    PERIOD_S = 2.0

    def __init__(
        self,
        places: dict[str, Place],
        say: Callable[[str], None],
        patience_s: float = 20.0,
        grace_s: float = 15.0,
        remedy: str = REMEDY,
    ) -> None:
        self.lost: str | None = None
        self.noted = False  # the main thread reports it
        self._places = places
        self._say = say
        self._patience = dict.fromkeys(places, patience_s) | {OWN: min(patience_s, OWN_PATIENCE_S)}
        self._grace = grace_s
        self.remedy = remedy
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop checking. May be called twice."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        heard = dict.fromkeys(self._places, time.monotonic())
        while not self._ended.wait(self.PERIOD_S):
            now = time.monotonic()
            heard |= dict.fromkeys(self._listening(), now)
            if any(now - last > self._patience[name] for name, last in heard.items()):
                self.lost = self._describe([name for name, last in heard.items() if last < now])
                break
        if self.lost is None:
            return
        if not self._ended.wait(min(NOTE_S, self._grace)) and not self.noted:
            self._say(f"The Ray cluster is gone: {self.lost}. {self.remedy}")
            sys.stderr.flush()
        if not self._ended.wait(self._grace):
            os._exit(1)

    def _describe(self, silent: Sequence[str]) -> str:
        which = " and ".join(f"{name} at {':'.join(map(str, self._places[name]))}" for name in silent)
        return f"{which} {'does' if len(silent) == 1 else 'do'} not answer any more"

    def _listening(self) -> Iterator[str]:
        for name, place in self._places.items():
            with contextlib.suppress(OSError):
                socket.create_connection(place, timeout=self.PERIOD_S).close()
                yield name


def places() -> dict[str, Place]:
    """Addresses of the cluster's head and of this node's raylet."""
    ray = load_ray()
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    own = ray.get_runtime_context().get_node_id()
    found = {HEAD: (host, int(port))}
    for node in ray.nodes():
        if node["NodeID"] == own:
            found[OWN] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return found
