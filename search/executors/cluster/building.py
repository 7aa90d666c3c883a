"""Files of a directory built by Ray actors, each a contiguous range of them, with retries where actors are lost."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from secateur.search.errors import ran_out_of_memory
from secateur.search.executors.cluster.connection import Connection, connect, disconnect
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import (
    FileServer,
    Folder,
    Receiver,
    StagingError,
    describe,
    local_copy,
    send,
    staged,
)
from secateur.search.executors.cluster.watchdog import REMEDY, ClusterLostError, Watchdog, places
from secateur.search.executors.cluster.worker_pool import unwrapped

POLL_S = 0.5

PARTS = ".parts"
"""Hidden directory for unfinished work beside the files."""


class Builds(Protocol):
    """Function that builds some of the files of a directory; it can be pickled."""

    @property
    def directories(self) -> Sequence[Path]:
        """Directories it reads; a worker on another node receives copies."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files, in order, of one directory; there or not."""
        ...

    def __call__(
        self,
        directories: Sequence[Path],
        to: Path,
        numbers: Collection[int],
        on_file: Callable[[Path], None],
        /,
    ) -> None:
        """Build files by their numbers in a directory for them alone, and hand over each when it is whole."""
        ...


@dataclass(frozen=True)
class Target:
    """Directory on the driver's node that the files are for.

    Args:
        path: of the directory.
        token: name of a file in its `PARTS`, which only nodes with this directory see, while this driver builds.
    """

    path: str
    token: str

    @property
    def parts(self) -> Path:
        """Directory on this node for unfinished work."""
        if self.is_here:
            return Path(self.path) / PARTS
        return staged() / f"parts-{hashlib.sha256(self.path.encode()).hexdigest()[:16]}"

    @property
    def is_here(self) -> bool:
        """True on nodes that share the directory."""
        return (Path(self.path) / PARTS / self.token).exists()


class Builder:
    """Builder of one range of files, run as a Ray actor.

    Files are built in a directory for the range, from which the next builder goes on after a kill, and moved to the
    target when they are whole: by name where the directory is shared, else over the network.

    Args:
        build: builds the files.
        folders: the directories that it reads, on the driver's node.
        target: of the files.
        file_server: actor to copy folders from; None where they are on this node.
        receiver: actor to send files to; None where the target is on this node.
    """

    def __init__(
        self, build: Builds, folders: Sequence[Folder], target: Target, file_server: Any, receiver: Any
    ) -> None:
        self._build, self._folders, self._target = build, folders, target
        self._file_server, self._receiver = file_server, receiver

    def ready(self) -> None:
        """No work: the actor runs."""

    def build(self, name: str, numbers: Sequence[int]) -> None:
        """Build files by their numbers; the range has a name."""
        directories = [Path(local_copy(folder, self._file_server)) for folder in self._folders]
        shared, root = self._target.is_here, self._target.parts
        part = root / name
        part.mkdir(parents=True, exist_ok=True)
        with FileLock(
            root / f"{name}.lock", fallback_to_soft=False
        ):  # an earlier driver's builder may still run
            self._build(directories, part, numbers, lambda path: self._hand_over(path, shared))
            shutil.rmtree(part)

    def _hand_over(self, path: Path, shared: bool) -> None:
        if not shared:
            send(path, self._receiver)
            path.unlink()
        elif self._target.is_here:
            path.replace(Path(self._target.path) / path.name)
        else:
            raise StagingError(f"Expected the driver that began {self._target.path}, got another one since.")


def build_by_workers(settings: RaySettings, build: Builds, on_files: Callable[[int], None]) -> None:
    """Build the missing files by the workers of a cluster, a contiguous range each, all at a time.

    The ranges depend on the number of workers alone, so that a killed build is continued with what each range has.
    Files of a range that lost `attempts` builders are left out, as are all if no builder can be started in `start_s`,
    or there is one worker alone: whoever uses the files builds those.

    Args:
        settings: of the cluster and its workers.
        build: builds the files.
        on_files: told the number of files that are there, now and then.

    Raises:
        ClusterLostError: if the cluster is lost.
        Exception: any exception of a builder.
    """
    files = build.files
    connection = connect(settings)
    try:
        ranges = _ranges(files, connection.n_workers)
        if connection.n_workers > 1 and ranges:
            _Build(settings, connection, build, on_files).run(ranges)
    finally:
        disconnect(connection)


def _ranges(files: Sequence[Path], n_ranges: int) -> dict[str, list[int]]:
    """Numbers of missing files by the name of their range."""
    bounds = [len(files) * i // n_ranges for i in range(n_ranges + 1)]
    found = {
        f"{first:04d}-{stop:04d}": [i for i in range(first, stop) if not files[i].exists()]
        for first, stop in pairwise(bounds)
    }
    return {name: missing for name, missing in found.items() if missing}


class _Build:
    """One build: its actors, and what is left to do."""

    def __init__(
        self,
        settings: RaySettings,
        connection: Connection,
        build: Builds,
        on_files: Callable[[int], None],
    ) -> None:
        self._ray = load_ray()
        self._settings, self._files, self._on_files = settings, build.files, on_files
        self._n_workers = connection.n_workers
        directory = self._files[0].parent
        self._parts = directory / PARTS
        self._parts.mkdir(exist_ok=True)
        for token in self._parts.glob("token-*"):  # of a driver that was killed
            token.unlink()
        self._token = self._parts / f"token-{uuid.uuid4().hex}"
        self._token.touch()
        folders = [describe(Path(read)) for read in build.directories]
        self._helpers: list[Any] = []
        if connection.joined:
            self._helpers = [
                self._here(FileServer, folders),
                self._here(Receiver, str(directory), [x.name for x in self._files]),
            ]
        target = Target(str(directory.resolve()), self._token.name)
        self._arguments = (self._ray.put(build), folders, target, *(self._helpers or (None, None)))
        self._actor = self._ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )(Builder)
        self._running: dict[Any, tuple[Any, str, list[int]]] = {}  # by the references of results
        self._failures: dict[str, int] = {}

    def _here(self, helper: Any, *arguments: Any) -> Any:
        """An actor on the driver's node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        return self._ray.remote(**options)(helper).remote(*arguments)

    def run(self, ranges: dict[str, list[int]]) -> None:
        """Build these ranges."""
        waiting = deque(ranges.items())
        watchdog = Watchdog(places(), _complain, remedy=REMEDY)
        started: list[Any] = []
        since, lost = time.monotonic(), False
        try:
            while waiting or self._running:
                while waiting:
                    started.append(self._start(*waiting.popleft()))
                ended, _ = self._ray.wait(list(self._running), timeout=POLL_S)
                if watchdog.lost is not None:
                    watchdog.noted = lost = True
                    raise ClusterLostError(
                        f"Expected the Ray cluster to keep running, but {watchdog.lost}. {watchdog.remedy}"
                    )
                for reference in ended:
                    waiting.extend(self._left(reference))
                self._on_files(sum(path.exists() for path in self._files))
                late = time.monotonic() - since > self._settings.start_s
                if late and not self._ray.wait(started, timeout=0)[0]:
                    return
            shutil.rmtree(self._parts)
        finally:
            watchdog.close()
            if not lost:  # else calls of Ray may hang
                self._token.unlink(missing_ok=True)
                for actor in (*(actor for actor, *_ in self._running.values()), *self._helpers):
                    self._ray.kill(actor, no_restart=True)

    def _start(self, name: str, numbers: list[int]) -> Any:
        """Start a builder; the reference of its start."""
        actor = self._actor.remote(*self._arguments)
        ready = actor.ready.remote()
        self._running[actor.build.remote(name, numbers)] = actor, name, numbers
        return ready

    def _left(self, reference: Any) -> list[tuple[str, list[int]]]:
        """The rest of a range whose builder has ended, to be tried again; none if it is whole, or was lost too often.

        Raises:
            Exception: the builder's own.
        """
        actor, name, numbers = self._running.pop(reference)
        exceptions = self._ray.exceptions
        try:
            self._ray.get(reference)
        except (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.ObjectLostError):
            pass
        except exceptions.RayTaskError as error:
            cause = unwrapped(error)
            if not ran_out_of_memory(cause):
                raise cause from error
        finally:
            self._ray.kill(actor, no_restart=True)
        left = [number for number in numbers if not self._files[number].exists()]
        if not left:
            return []
        self._failures[name] = self._failures.get(name, 0) + 1
        return [(name, left)] if self._failures[name] < self._settings.attempts else []


def _complain(line: str) -> None:
    sys.stderr.write(f"secateur: error: {line}\n")
