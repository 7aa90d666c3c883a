"""What every test relies on: no network, a fixed number of threads, and examples that repeat."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.command import secateur  # noqa: F401  # fixtures for all
from tests.ray_session import ray_cluster  # noqa: F401

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


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share a process, for the fixtures that they share; those with a Ray are all in one.

    They take longest and come first.
    """
    on_ray = {id(item): "ray_cluster" in getattr(item, "fixturenames", ()) for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray[id(item)] else item.path.stem))
    items.sort(key=lambda item: not on_ray[id(item)])
