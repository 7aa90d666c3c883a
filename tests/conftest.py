"""What every test relies on: no network, a fixed number of threads, and examples that repeat."""

import functools
import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.command import made, secateur  # noqa: F401  # fixtures for all
from tests.hub_server import own_hub  # noqa: F401
from tests.ray_session import ray_cluster  # noqa: F401
from tests.reloading import forked_reload, in_process, stock_process  # noqa: F401
from tests.tasks import task_directory, tiny  # noqa: F401
from tests.tokenized import long_texts_tokenized_once  # noqa: F401
from tests.typecheck import checked  # noqa: F401  # named in pyproject.toml

# Before torch and transformers are imported, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

# deadline: the first example of a test pays for imports. derandomize: a failure in CI is one that everybody can repeat.
settings.register_profile("secateur", deadline=None, derandomize=True, database=None)
settings.load_profile("secateur")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def uses_ray(file: Path) -> bool:
    return "ray_cluster" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a Ray take longest and come first."""
    items.sort(key=lambda item: not uses_ray(item.path))


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which would walk through them again and again."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests of one file share a process, for the fixtures that they share; all files with a Ray are in one.

    In place of xdist's own `loadgroup`: with pytest 9.2 the groups that it writes into a test's name have no effect.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if uses_ray(config.rootpath / file) else file

    return ByFile(config, log)  # type: ignore[arg-type]
