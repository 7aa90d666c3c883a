"""Web page of a run: optuna-dashboard on its mirror."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from secateur.search.errors import UsageError
from secateur.search.mirror.address import check_storage
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import Storage, storage_of
from secateur.search.results.run import Run
from secateur.search.study.lock import RunLock


class _Server(ThreadingMixIn, WSGIServer):
    """Server with one thread a request, as a page sends several at once."""

    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No log line a request."""


def serve_dashboard(run: Run, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the dashboard until a KeyboardInterrupt, which is passed on.

    Missing trials are added to the mirror first, unless a driver is writing it.

    Args:
        run: finished, or one that is being written.
        host: address to listen at; who reaches it may also change the mirror, but not the run.
        port: 0 for any that is free.
        say: called with the address.

    Raises:
        UsageError: if optuna-dashboard is missing, the mirror can't be read, or the port is not free.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise UsageError(
            "Expected optuna-dashboard to be installed, got none. Install it: pip install 'secateur[dashboard]'."
        ) from None
    check_storage(run.settings.storage)
    storage = storage_of(run.study.directory, run.settings.storage)
    try:
        name, opened = _mirrored(run, storage), storage.open()
        try:
            server = make_server(host, port, wsgi(opened), server_class=_Server, handler_class=_Silent)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"Expected to listen at {host}:{port}, got: {reason}. Choose another with --port or --host."
            ) from None
        with server:
            say(f"http://{host}:{server.server_port}/dashboard/studies/{opened.get_study_id_from_name(name)}")
            server.serve_forever()
    finally:
        storage.close()


def _mirrored(run: Run, storage: Storage) -> str:
    """Name of the run's Optuna study, brought up to date first unless a driver is writing it."""
    lock = None
    with contextlib.suppress(UsageError, OSError):  # a driver holds it, or the run is somebody else's
        lock = RunLock(run.study.directory)
    if lock is not None:
        try:
            run.study.refresh()
            OptunaCopy(run.study, run.space, run.objectives, run.fidelity, storage).catch_up()
        except Exception as error:
            raise UsageError(
                f"Expected to bring the mirror {storage.text} up to date, got: {storage.reason(error)}."
            ) from error
        finally:
            lock.close()
    found = storage.load()
    if found is None:
        raise UsageError(
            f"Expected a mirror of {run.study.directory} in {storage.text}, got none yet. Wait for the search to "
            f"make it."
        )
    return found.study_name
