"""What is built once for all, and kept under the user's cache."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from secateur.pruners.models.checkpoints.cache import cache_root, cached
from secateur.pruners.models.checkpoints.directory import hash_files


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_root() == Path("/b/secateur")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root() == Path("/c/.cache/secateur")


def test_a_cached_directory_is_built_once_and_again_if_it_changed(cache):
    builds = []

    def build(directory):
        builds.append(directory)
        (directory / "file").write_text("content")

    place = cached("key", build)
    assert cached("key", build) == place
    assert len(builds) == 1
    (place / "file").write_text("damaged")
    assert (cached("key", build) / "file").read_text() == "content"
    (place / "file").unlink()
    assert (cached("key", build) / "file").read_text() == "content"
    assert len(builds) == 3
    assert sorted(path.name for path in cache.iterdir()) == ["key", "key.lock"]


def test_a_build_that_fails_leaves_nothing_behind(cache):
    def build(directory):
        (directory / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("key", build)
    assert [path.name for path in cache.iterdir()] == ["key.lock"]


def test_one_of_many_builds_and_the_others_wait(cache):
    builds, results = [], []
    everyone_asks = threading.Barrier(4)

    def build(directory):
        builds.append(directory)
        (directory / "file").write_text("content")

    def ask():
        everyone_asks.wait()
        results.append((cached("key", build) / "file").read_text())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["content"] * 4
    assert len(builds) == 1


def test_a_hash_of_files_depends_on_names_and_contents_alone(tmp_path):
    for folder, names in (("one", "ab"), ("two", "ba"), ("three", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("x" if name == "a" else "y")
    one, two, three = (hash_files(list((tmp_path / f).iterdir())) for f in ("one", "two", "three"))
    assert one == two
    assert one != three
