"""Level stores built by workers, each some blocks: the driver's bytes, whoever dies."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ray import cloudpickle

from secateur.evaluators.level_setup import level_setups
from secateur.pruners.calibration.stream import Walk, stream_blocks
from secateur.pruners.recipes.pruner import STATISTICS
from secateur.search import app
from secateur.search.app import level_building
from secateur.search.executors.cluster import building
from secateur.search.executors.cluster.building import PARTS, Builder, Target, build_by_workers
from secateur.search.executors.cluster.connection import connect
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import Receiver, StagingError
from tests.slow_files import TWO, Far, Slow
from tests.streaming import saved
from tests.test_killed_walks import N_BLOCKS
from tests.test_streamed_search import EVALUATOR, settings
from tests.test_streamed_search import SPACES as BY_BLOCKS

SPACES = BY_BLOCKS | {
    "formulas": {"kind": "formula", "terminals": ["W", "X", "H"], "target": 0.5},
    "formulas with gradients": {"kind": "formula", "terminals": ["W", "X", "G"], "target": 0.5},
}
RECIPES = {
    "kind": "recipe",
    "unit": "weights",
    "target": 0.5,
    "metrics": ["wanda", "sparsegpt"],
    "known": ["wanda", "sparsegpt"],
    "samples": [2, 4],
    "length": [32],
    "pool_tokens": 1024,
    "subsets": 1,
}
WORKERS = {"threads": 1, "spread": False, "device": "cpu", "share": 1.0}
CASES = [
    ("llama", "ranks", False),
    ("llama", "weights", False),
    ("llama", "no statistics", False),
    ("llama", "structure", False),
    ("llama", "formulas", False),
    ("llama", "formulas with gradients", False),
    ("mixtral", "ranks", True),
    ("mixtral", "structure", False),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """In this process as in the workers: sums are of the same order then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(directory: Path) -> dict[str, tuple[object, bytes]]:
    """Header, of tensors, and all other bytes of each file but the hidden ones, by name."""
    found = {}
    for path in directory.iterdir():
        if not path.name.startswith("."):
            header, data = None, path.read_bytes()
            if path.suffix == ".safetensors":  # whose header is written in no fixed order
                start = 8 + int.from_bytes(data[:8], "little")
                header, data = json.loads(data[8:start]), data[start:]
            found[path.name] = header, data
    return found


# --- blocks apart from others ---


@pytest.mark.parametrize(("kind", "space", "all_experts"), CASES)
def test_blocks_that_are_built_apart_are_the_drivers(tmp_path, kind, space, all_experts):
    changes = {"num_hidden_layers": N_BLOCKS} if kind == "llama" else {}
    model = saved(tmp_path / "model", kind, torch.bfloat16, **changes)
    evaluator = {**EVALUATOR, "moe_all_experts": all_experts}
    further = {"dtype": "bfloat16"} if space.startswith("formulas") else {}
    session = app.open_session(settings(model, "never", SPACES[space], evaluator=evaluator, **further))
    session.build_levels(tmp_path / "alone")
    n, levels = len(session.anatomy.blocks), tmp_path / "levels"
    [setup] = level_setups(session, levels, **WORKERS)
    setup = pickle.loads(pickle.dumps(setup))
    handed: list[str] = []

    def move(path: Path) -> None:
        handed.append(path.name)
        path.replace(levels / path.name)

    for first, stop in pairwise([0, n // 2, n]):
        setup(setup.directories, tmp_path / str(first), range(first, stop), move)
    assert handed == [path.name for path in setup.files] == [f"block-{i:04d}.safetensors" for i in range(n)]
    session.build_levels(levels)
    assert content(levels) == content(tmp_path / "alone")


def recipe_session(model: Path):
    return app.open_session(settings(model, "never", RECIPES, dtype="bfloat16"))


def test_statistics_of_recipes_that_are_built_apart_are_the_drivers(tmp_path):
    model = saved(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=N_BLOCKS)
    session = recipe_session(model)
    for name in ("alone", "levels"):
        session.build_levels(tmp_path / name)
    alone, levels = (tmp_path / name / STATISTICS for name in ("alone", "levels"))
    assert not alone.exists()  # collected when they are asked for
    session.pruner.open(tmp_path / "alone")
    recipes = [x for name, x in session.space.baselines().items() if name != "dense"]
    [calibration] = {str(x): x for x in (session.config(y.text)["calibration"] for y in recipes)}.values()
    sample = session.pruner.context.sample(calibration)
    sample.statistics.prepare(inputs="gram")
    [setup] = level_setups(session, tmp_path / "levels", **WORKERS)
    assert setup.doing == "collecting statistics"
    assert set(setup.calibration.sources) == set()
    setup = cloudpickle.loads(cloudpickle.dumps(setup))  # as Ray does
    for part in ([3, 4], [0, 1]):  # a worker, the other one until it is killed
        setup(setup.directories, tmp_path / str(part[0]), part, lambda x: x.replace(setup.levels / x.name))
    session.build_levels(tmp_path / "levels")  # what is left
    [before], [after] = (
        [x for x in place.iterdir() if not x.name.startswith(".")] for place in (alone, levels)
    )
    assert before.name == after.name
    assert content(before) == content(after)
    assert len(content(after)) == N_BLOCKS
    assert list(level_setups(session, tmp_path / "levels", **WORKERS)) == []


def test_what_needs_pruned_blocks_or_gradients_is_built_by_one(tmp_path):
    for space in (SPACES["behind pruned blocks"], {"kind": "allocation", "metric": "gblm", "target": 0.5}):
        session = app.open_session(settings("tiny", "never", space))
        assert list(level_setups(session, tmp_path / "levels", **WORKERS)) == []
    assert not (tmp_path / "levels").exists()


def test_blocks_before_those_wanted_get_no_statistics(tmp_path):
    anatomy = app.open_session(settings("tiny", "never", SPACES["ranks"])).anatomy
    tokens = torch.arange(64).reshape(2, 32)
    whole = list(stream_blocks(anatomy, tokens, inputs="gram"))
    *leading, last = stream_blocks(anatomy, tokens, inputs="gram", missing=[len(whole) - 1])
    assert all(not part.inputs for part in leading)
    assert last.inputs.keys() == whole[-1].inputs.keys()
    assert all(torch.equal(x.gram, whole[-1].inputs[name].gram) for name, x in last.inputs.items())


def test_a_worker_with_another_identity_is_refused(tmp_path):
    session = app.open_session(settings("tiny", "never", SPACES["ranks"]))
    [setup] = level_setups(session, tmp_path / "levels", **WORKERS)
    object.__setattr__(setup, "fingerprint", "another")
    with pytest.raises(ValueError, match="with the methods and libraries of the driver"):
        setup(setup.directories, tmp_path / "part", [0], lambda path: None)
    assert [x.name for x in (tmp_path / "levels").iterdir()] == ["store.json"]


def test_a_finished_store_stays_finished(tmp_path):
    session = app.open_session(settings("tiny", "never", SPACES["ranks"]))
    session.build_levels(tmp_path)
    before = content(tmp_path)
    [setup] = level_setups(session, tmp_path, **WORKERS)
    assert all(path.exists() for path in setup.files)
    assert content(tmp_path) == before


# --- over Ray ---


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "levels").mkdir()

    def make(**of: object) -> Slow:
        return Slow(tmp_path / "levels", tmp_path / "log", **of)

    return make


@pytest.mark.parametrize("space", ["weights", "formulas with gradients", "recipes"])
def test_workers_build_the_drivers_store(tmp_path, ray_cluster, monkeypatch, space):
    monkeypatch.setattr(level_building, "WORTH_WORKERS", 0)
    model = saved(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=N_BLOCKS)
    of, further = (SPACES | {"recipes": RECIPES})[space], {"dtype": "bfloat16"}
    app.search(settings(model, "never", of, **further), tmp_path / "alone")
    here, told = [], []
    monkeypatch.setattr(Walk, "through", lambda self, block, *of: here.append(block.index))
    executor = {"kind": "ray", "workers": 2, "cpus_per_worker": 0.5, "deterministic": True}
    app.search(settings(model, "never", of, executor=executor, **further), tmp_path / "run", say=told.append)
    assert here == []
    doing = "collecting statistics" if space == "recipes" else "building levels"
    assert f"{doing} by workers {N_BLOCKS}/{N_BLOCKS}" in told
    assert content(tmp_path / "run" / "levels") == content(tmp_path / "alone" / "levels")
    assert not (tmp_path / "run" / "levels" / PARTS).exists()
    values = [
        {t.measurement.candidate: t.measurement.values for t in app.open_run(tmp_path / name).trials()}
        for name in ("alone", "run")
    ]
    assert values[0] == values[1]


def test_a_killed_worker_costs_the_block_it_was_at(slow, ray_cluster):
    told: list[int] = []
    build = slow(deadly=4, deaths=1)
    build_by_workers(TWO, build, told.append)
    assert sorted(build.written) == [0, 1, 2, 3, 4, 4, 5]
    assert [path.read_text() for path in build.files] == [str(i) for i in range(6)]
    assert told[-1] == 6
    assert [x.name for x in build.directory.iterdir() if x.is_dir()] == []


def test_blocks_that_kill_their_workers_are_left_to_the_driver(slow, ray_cluster):
    build = slow(deadly=1, deaths=9)
    build_by_workers(TWO, build, lambda n: None)
    assert [path.exists() for path in build.files] == [True, False, False, True, True, True]
    assert build.written.count(1) == TWO.attempts


def test_what_a_worker_says_comes_out(slow, ray_cluster):
    with pytest.raises(ValueError, match=r"^Expected some room, got none\.$"):
        build_by_workers(TWO, slow(deadly=5), lambda n: None)


def test_one_worker_alone_leaves_all_to_the_driver(slow, ray_cluster):
    build = slow()
    build_by_workers(RaySettings(workers=1), build, lambda n: None)
    assert not build.log.exists()


def test_without_room_for_a_worker_the_driver_builds_alone(slow, ray_cluster):
    import ray

    holding = ray.remote(num_cpus=2)(Receiver).remote("/nowhere", [])
    ray.get(holding.__ray_ready__.remote())
    build = slow()
    build_by_workers(RaySettings(workers=2, start_s=1), build, lambda n: None)
    ray.kill(holding)
    assert not build.log.exists()


def test_files_come_over_the_network_from_nodes_that_do_not_share_the_directory(slow, tmp_path, ray_cluster):
    build, told = Far(**vars(slow())), []
    connection = connect(TWO)
    one = building._Build(TWO, connection, build, told.append)
    one._token.unlink()  # as nodes without the directory see it
    one.run(building._ranges(build.files, connection.n_workers))
    assert [path.read_text() for path in build.files] == [str(i) for i in range(6)]
    assert told[-1] == 6
    [there] = (tmp_path / "cache" / "staged").iterdir()
    assert sorted(x.name for x in there.iterdir()) == ["0000-0003.lock", "0003-0006.lock"]


DRIVER = """
import pickle, sys
import ray
from secateur.search.executors.cluster.building import build_by_workers
from tests.slow_files import TWO
build = pickle.load(open(sys.argv[1], "rb"))
build_by_workers(TWO.model_copy(update={"address": sys.argv[2]}), build, lambda n: None)
"""


def test_after_a_killed_driver_only_missing_blocks_are_built(slow, tmp_path, ray_cluster):
    build = slow(pause=0.5)
    (tmp_path / "build").write_bytes(pickle.dumps(build))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "build"), ray_cluster]
    driver, end = subprocess.Popen(command), time.monotonic() + 120
    while not any(path.exists() for path in build.files):
        assert driver.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    assert not all(path.exists() for path in build.files)
    first = {path: path.stat().st_mtime_ns for path in build.files if path.exists()}
    build_by_workers(TWO, build, lambda n: None)
    assert [path.read_text() for path in build.files] == [str(i) for i in range(6)]
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert all(build.written.count(i) == 1 for i in range(6) if build.files[i] in first)
    assert not (build.directory / PARTS).exists()


# --- nodes that don't have the directory ---


class Local:
    """An actor's methods, in this process."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str):
        return type("Method", (), {"remote": staticmethod(getattr(self._actor, name))})


@pytest.fixture
def far(tmp_path, monkeypatch, slow):
    """A build on a node that does not see the directory, and the receiver of its files."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("secateur.search.executors.cluster.staging._get", lambda value: value)
    monkeypatch.setattr("secateur.search.executors.cluster.staging.CHUNK_BYTES", 1)
    build = slow(n=12)
    receiver = Receiver(str(build.directory), [path.name for path in build.files])
    return (
        build,
        receiver,
        Builder(build, [], Target(str(build.directory), "token-unseen"), None, Local(receiver)),
    )


def test_files_are_sent_where_the_directory_is_not_shared(far, tmp_path):
    build, _, builder = far
    builder.build("0008-0012", [8, 11])
    there = [path for path in build.directory.iterdir() if not path.name.startswith(".")]
    assert {path.name: path.read_text() for path in there} == {
        "block-0008.safetensors": "8",
        "block-0011.safetensors": "11",
    }
    assert not [x for x in (tmp_path / "cache").rglob("*") if x.is_file() and x.suffix != ".lock"]


def test_a_damaged_file_is_not_taken(far, monkeypatch):
    build, receiver, builder = far
    monkeypatch.setattr(
        receiver, "write", lambda name, offset, chunk: Receiver.write(receiver, name, offset, b"x")
    )
    with pytest.raises(StagingError, match=r"Expected block-0003\.safetensors with SHA-256"):
        builder.build("0000-0006", [3])
    assert content(build.directory) == {}


def test_a_receiver_takes_no_other_file(far, tmp_path):
    with pytest.raises(StagingError, match=r"a file of the level store, got \.\./about\.json"):
        far[1].write("../about.json", 0, b"{}")
    assert not (tmp_path / "about.json").exists()


def test_a_builder_of_an_earlier_driver_hands_over_nothing(slow):
    build = slow()
    (build.directory / PARTS).mkdir()
    token = build.directory / PARTS / "token-old"
    token.touch()

    def superseded(directories, to, numbers, on_file):
        token.unlink()
        (to / "block-0001.safetensors").touch()
        on_file(to / "block-0001.safetensors")

    builder = Builder(superseded, [], Target(str(build.directory), token.name), None, None)
    with pytest.raises(StagingError, match="got another one since"):
        builder.build("0000-0003", [1])
    assert content(build.directory) == {}


def test_ranges_depend_on_the_number_of_workers_alone(slow):
    build = slow(n=7)
    assert building._ranges(build.files, 3) == {
        "0000-0002": [0, 1],
        "0002-0004": [2, 3],
        "0004-0007": [4, 5, 6],
    }
    for number in (0, 2, 3, 5):
        build.files[number].touch()
    assert building._ranges(build.files, 3) == {"0000-0002": [1], "0004-0007": [4, 6]}
