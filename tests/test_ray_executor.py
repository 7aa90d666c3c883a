"""Workers that die, hang, run out of memory or raise; what is refused before anything begins."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from secateur.search.errors import UsageError
from secateur.search.executor import ExecutorError, Job
from secateur.search.executors.cluster import watchdog
from secateur.search.executors.cluster.connection import connect, reached
from secateur.search.executors.cluster.executor import RayExecutor
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import FileServer, StagingError, describe, local_copy
from tests.toy import SMALL, SPACE, OneMax, Ready, ToyEvaluator

pytestmark = pytest.mark.usefixtures("ray_cluster")

DEADLY, HANGING, HUNGRY, BROKEN = "0101010101", "0010101010", "0001010101", "0000101010"
GOOD = ["0000011111", "0000111110", "0001111100"]


class Dangerous(ToyEvaluator):
    """Some candidates take their worker with them."""

    def evaluate(self, candidates, fidelity):
        if DEADLY in candidates:
            os.kill(os.getpid(), 9)
        if HANGING in candidates:
            time.sleep(60)
        if HUNGRY in candidates:
            raise MemoryError("no room for 8 GB")
        if BROKEN in candidates:
            raise ZeroDivisionError("a bug")
        return super().evaluate(candidates, fidelity)


class Stillborn(Ready):
    def __call__(self, directories):
        os.kill(os.getpid(), 9)


class Unready(Ready):
    def __call__(self, directories):
        raise ValueError("Expected a model, got none.")


def run(executor, *jobs: Job) -> dict[str, str | None]:
    """Reason of each candidate, None where it was measured."""
    for job in jobs:
        executor.submit(job)
    found = {}
    while executor.n_pending:
        for job, measurements in executor.wait():
            assert tuple(m.candidate for m in measurements) == job.candidates
            found |= {m.candidate: m.infeasible for m in measurements}
    return found


def waited(executor):
    """The next results; `wait` gives none while workers start."""
    while True:
        if ended := executor.wait():
            return ended


@pytest.fixture(scope="module")
def executor(ray_cluster):
    with RayExecutor(RaySettings(workers=2, cpus_per_worker=0.5), Ready(Dangerous(SPACE))) as made:
        yield made


def test_a_deadly_candidate_is_infeasible_and_takes_no_other_with_it(executor):
    jobs = Job(0, (GOOD[0], DEADLY, GOOD[1]), SMALL), Job(1, (GOOD[2],), SMALL)
    assert run(executor, *jobs) == {**dict.fromkeys(GOOD), DEADLY: "its worker died, 2 times"}
    assert executor.worker_status.lost == 2
    assert "died" in executor.worker_status.troubles[-1]


def test_a_hanging_call_is_ended(ray_cluster):
    settings = RaySettings(workers=1, cpus_per_worker=0.5, timeout_s=4)
    with RayExecutor(settings, Ready(Dangerous(SPACE))) as executor:
        found = run(executor, Job(2, (HANGING, GOOD[0]), SMALL))
    assert found == {HANGING: "its worker took longer than 4 s, 2 times", GOOD[0]: None}


def test_a_worker_without_memory_is_replaced(executor):
    found = run(executor, Job(3, (GOOD[1], HUNGRY), SMALL))
    assert found == {GOOD[1]: None, HUNGRY: "its worker ran out of memory (no room for 8 GB), 2 times"}


def test_a_bug_comes_out_as_it_is(executor):
    executor.submit(Job(4, (BROKEN,), SMALL))
    executor.submit(Job(40, (GOOD[0],), SMALL))
    found = []

    def wait_for_all() -> None:
        while executor.n_pending:
            found.extend(executor.wait())

    with pytest.raises(ZeroDivisionError, match="a bug"):
        wait_for_all()
    wait_for_all()  # the other job, done before or after it, is not lost
    assert [job.number for job, _ in found] == [40]


def test_workers_are_named_and_one_attempt_means_one(ray_cluster):
    with RayExecutor(RaySettings(workers=1, attempts=1), Ready(Dangerous(SPACE))) as executor:
        executor.submit(Job(0, tuple(GOOD), SMALL))
        [(_, measured)] = waited(executor)
        assert {m.worker.split(":")[0] for m in measured} == {socket.gethostname()}
        assert run(executor, Job(1, (DEADLY,), SMALL)) == {DEADLY: "its worker died"}


def test_workers_that_never_start_end_the_search(ray_cluster):
    with RayExecutor(RaySettings(workers=1), Stillborn(ToyEvaluator(SPACE))) as executor:
        executor.submit(Job(0, (GOOD[0],), SMALL))
        with pytest.raises(ExecutorError, match="3 in a row that were lost during setup"):
            waited(executor)


def test_what_is_wrong_with_the_setup_is_said(ray_cluster):
    with RayExecutor(RaySettings(workers=1), Unready(ToyEvaluator(SPACE))) as executor:
        executor.submit(Job(0, (GOOD[0],), SMALL))
        with pytest.raises(ValueError, match="Expected a model, got none"):
            waited(executor)


def test_no_room_for_any_worker_is_said(executor):
    run(executor, Job(5, (GOOD[0],), SMALL))  # its workers have taken their places
    settings = RaySettings(workers=1, cpus_per_worker=2, start_s=3)
    with RayExecutor(settings, Ready(Dangerous(SPACE))) as second:
        second.submit(Job(0, (GOOD[0],), SMALL))
        assert second.wait() == []  # none is ready: a search may be stopped meanwhile
        with pytest.raises(ExecutorError, match=r"to be ready within 3 s \(`executor\.start_s`\)"):
            waited(second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 3}, "Expected 3 CPUs for 3 workers, got a cluster with 2"),
        ({"workers": 1, "gpus_per_worker": 1}, "Expected 1 GPUs for 1 workers, got a cluster with 0"),
    ],
)
def test_more_than_the_cluster_has_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        connect(RaySettings(**settings))


def test_workers_default_to_what_there_is_room_for():
    assert connect(RaySettings()).n_workers == 2
    assert connect(RaySettings(cpus_per_worker=0.5)).n_workers == 4


@pytest.mark.parametrize("address", ["ray://a:1", "somewhere", "a b:10", ":80"])
def test_addresses_are_checked(address):
    with pytest.raises(ValueError, match="Expected `address` to be null, auto or host:port"):
        RaySettings(address=address)


def test_what_cannot_travel_is_refused():
    with (
        pytest.raises(UsageError, match="to be picklable, got TypeError: cannot pickle"),
        reached(RaySettings(), {"lock": threading.Lock()}),
    ):
        pass


# --- directories on nodes that don't have them ---


class Remote:
    """A file server with the methods of an actor, in this process."""

    def __init__(self, file_server: FileServer) -> None:
        self.n_reads = 0
        self.file_server = file_server

    @property
    def read(self):
        self.n_reads += 1
        return Local(self.file_server.read)

    @property
    def digest(self):
        return Local(self.file_server.digest)


class Local:
    def __init__(self, method) -> None:
        self.remote = method


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A folder whose driver's place is not to be seen here, and its file server."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("secateur.search.executors.cluster.staging._get", lambda value: value)
    monkeypatch.setattr("secateur.search.executors.cluster.staging._in_place", lambda folder: False)
    monkeypatch.setattr("secateur.search.executors.cluster.staging.CHUNK_BYTES", 1000)
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "large").write_bytes(os.urandom(3500))
    (source / "in" / "small.json").write_text("{}")
    (source / "empty").touch()
    (source / ".hidden").touch()
    folder = describe(source)
    return source, folder, Remote(FileServer([folder]))


def test_a_folder_is_copied_once(moved):
    source, folder, file_server = moved
    first = local_copy(folder, file_server)
    n_reads = file_server.n_reads
    assert n_reads == 4 + 1
    assert local_copy(folder, file_server) == first != str(source)
    assert file_server.n_reads == n_reads
    assert describe(type(source)(first)).files == folder.files


def test_a_folder_that_is_in_place_is_used_there(moved, monkeypatch):
    monkeypatch.undo()
    source, folder, _ = moved
    assert local_copy(folder, None) == str(source)
    (source / "in" / "small.json").write_text("[]")  # as large, another content
    with pytest.raises(StagingError, match="the same files as on the driver's node"):
        local_copy(folder, None)


def test_a_damaged_copy_is_refused_and_made_anew(moved, monkeypatch):
    _, folder, file_server = moved
    monkeypatch.setattr(file_server.file_server, "digest", lambda *names: "0" * 64)
    with pytest.raises(StagingError, match="with SHA-256 0000"):
        local_copy(folder, file_server)
    monkeypatch.undo()


def test_a_file_server_serves_no_other_file(moved):
    source, _, file_server = moved
    with pytest.raises(StagingError, match="a file of the run"):
        file_server.file_server.read(str(source), "../cache", 0)


# --- a cluster that goes away ---


def test_a_silent_head_is_noticed_and_a_hanging_process_is_ended(monkeypatch):
    monkeypatch.setattr(watchdog.Watchdog, "PERIOD_S", 0.02)
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: ended.set())
    said = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        place = server.getsockname()
        dog = watchdog.Watchdog({"the head": place}, said.append, patience_s=0.3, grace_s=0.1)
        time.sleep(0.5)
        assert dog.lost is None
    assert ended.wait(10)
    assert dog.lost == f"the head at 127.0.0.1:{place[1]} does not answer any more"
    assert len(said) == 1


def test_evaluators_of_other_spaces_work_alike(ray_cluster):
    with RayExecutor(RaySettings(workers=1), Ready(ToyEvaluator(OneMax(4, (2,))))) as executor:
        assert run(executor, Job(0, ("0011", "1100"), SMALL)) == {"0011": None, "1100": "begins with 11"}
