"""Connection to Ray: a local instance or a cluster, with an error message for each way it can fail."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.search.errors import UnavailableError, UsageError
from secateur.search.executors.cluster.code import missing_code
from secateur.search.executors.cluster.lazy_ray import kept_to_this_machine, load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.watchdog import ClusterLostError

OBJECT_STORE_BYTES = 256 << 20
"""Size for a local Ray: candidates and measurements are small, weights are memory-mapped files."""

PROBE_S = 5.0
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}

_started: set[str] = set()
"""Addresses of the Ray instances started by this process."""


@dataclass(frozen=True)
class Connection:
    """A connection to Ray.

    Args:
        joined: whether it is a cluster, possibly with other nodes, and not an instance started by this process.
        ours: whether `connect` made the connection, so that it has to be closed.
        n_workers: number of workers to start.
    """

    joined: bool
    ours: bool
    n_workers: int


def connect(settings: RaySettings) -> Connection:
    """Connect to Ray; an existing connection of this process is reused.

    Raises:
        UsageError: if Ray is not installed, no cluster answers at the address, it runs another version of Ray or
            Python, or has too few CPUs or GPUs.
    """
    with kept_to_this_machine() if settings.address is None else contextlib.nullcontext():
        ray = load_ray()
        known = ray.is_initialized()
        if not known:
            _started.clear()  # they have ended; their addresses may be reused
            with _own_signal_handlers():
                _start(settings) if settings.address is None else _join_with_code(settings.address)
    joined = ray.get_runtime_context().gcs_address not in _started
    try:
        return Connection(joined, not known, _n_workers(settings))
    except UsageError:
        if not known:
            ray.shutdown()
        raise


@contextlib.contextmanager
def reached(settings: RaySettings, payload: Any) -> Iterator[None]:
    """Connection to Ray for the length of a context; `payload` are the objects that workers will be sent.

    Raises:
        UsageError: as `connect`, or if the payload can't be pickled.
    """
    connection = connect(settings)
    try:
        check_pickles(payload)
        yield
    except ClusterLostError:  # nothing to disconnect from
        raise
    except BaseException:
        disconnect(connection)
        raise
    disconnect(connection)


def check_pickles(payload: Any) -> None:
    """Raise a `UsageError` unless the object can be sent to workers."""
    try:
        load_ray().cloudpickle.dumps(payload)
    except Exception as error:  # any exception of its own methods
        raise UsageError(
            f"Expected the workers' setup to be picklable, got {type(error).__name__}: {error}. Keep open "
            f"files, locks and models out of plug-ins, and make them in the worker."
        ) from error


def disconnect(connection: Connection) -> None:
    """Close a connection that `connect` made; ends a local Ray."""
    if connection.ours:
        load_ray().shutdown()


def _start(settings: RaySettings) -> None:
    n_cpus = os.cpu_count() or 1
    wanted = math.ceil((settings.workers or 0) * settings.cpus_per_worker)
    ray = load_ray()
    ray.init(
        address="local",
        num_cpus=max(n_cpus, wanted),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **QUIET,
    )
    _started.add(ray.get_runtime_context().gcs_address)


def _join_with_code(address: str) -> None:
    """Join; if a node lacks this code, join again and send it: Ray accepts code only at the connection."""
    _join(address)
    try:
        with tempfile.TemporaryDirectory(prefix="secateur-code-") as directory:
            modules = missing_code(Path(directory))
            if modules:
                load_ray().shutdown()
                _join(address, runtime_env={"py_modules": modules})
    except UsageError:
        load_ray().shutdown()
        raise


def _join(address: str, **options: Any) -> None:
    if address != "auto":
        _probe(address)
    try:
        load_ray().init(address=address, **QUIET, **options)
    except ConnectionError as error:
        if address == "auto":
            advice = "Start one with `ray start --head`, or leave the address out."
        else:  # something listens there
            mode = os.environ.get("RAY_AUTH_MODE", "unset")
            advice = (
                f"Set RAY_AUTH_MODE (here: {mode}) as it is at the head; if that is `token`, ~/.ray/auth_token must be "
                f"the same in both places."
            )
        raise UnavailableError(
            f"Expected a Ray cluster at `executor.address` {address}, got none ({_first_line(error)}). {advice}"
        ) from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UsageError(
            f"Expected the versions of Ray and Python that the cluster at {address} runs, got others: "
            f"{' '.join(str(error).split())} Install the same ones here and there."
        ) from None


def _probe(address: str) -> None:
    """Fail at once where no head listens: Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"Expected a Ray cluster at `executor.address` {address}, got: {_first_line(error)}. Start its head "
            f"with `ray start --head --port {port}`, or correct the address."
        ) from None


def _n_workers(settings: RaySettings) -> int:
    """Number of workers to start.

    Raises:
        UsageError: if the cluster has too few CPUs or GPUs.
    """
    total = load_ray().cluster_resources()
    each = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    room = {name: total.get(name, 0.0) / amount for name, amount in each.items() if amount}
    name = min(room, key=lambda name: room[name])
    most = math.floor(room[name] + 1e-9)
    wanted = settings.workers or max(most, 1)
    if wanted > most:
        raise UsageError(
            f"Expected {wanted * each[name]:g} {name}s for {wanted} workers, got a cluster with "
            f"{total.get(name, 0.0):g}. Lower `executor.workers` or `executor.{name.lower()}s_per_worker`, "
            "or add nodes."
        )
    return wanted


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that end a search cleanly after Ray has replaced them."""
    if threading.current_thread() is not threading.main_thread():  # where Ray sets none
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
