"""The level store: cut short, of another key, on a full disk, damaged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from secateur.pruners.stores.block_files import LevelStoreError, is_built
from secateur.pruners.weights.level_store import LevelStore, build_levels
from secateur.pruners.weights.method import Method
from tests.blockwise import LEVELS, make_key
from tests.models import random_tokens, small_anatomy


class Cut(Exception):  # noqa: N818
    pass


def cut(index: int) -> None:
    raise Cut


def test_a_store_that_was_cut_short_goes_on(tmp_path):
    anatomy, key, seen = small_anatomy(), make_key(Method("wanda")), []
    with pytest.raises(Cut):
        build_levels(tmp_path, anatomy, random_tokens(4, 16), key, on_block=cut)
    assert not is_built(tmp_path, key)
    first = (tmp_path / "block-0000.safetensors").stat().st_mtime_ns
    build_levels(tmp_path, anatomy, random_tokens(4, 16), key, on_block=seen.append)
    assert is_built(tmp_path, key)
    assert seen == [0, 1]
    assert (tmp_path / "block-0000.safetensors").stat().st_mtime_ns == first


def test_a_store_of_another_key_is_made_anew(tmp_path):
    anatomy = small_anatomy()
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    assert not is_built(tmp_path, make_key(Method("magnitude")))
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("magnitude")))
    linear = next(anatomy.linears)
    found = LevelStore(tmp_path, anatomy, LEVELS).weight(linear, 2)
    lowest_kept = linear.weight.abs()[found != 0].min()
    assert linear.weight.abs()[found == 0].max() <= lowest_kept


def test_blocks_of_another_key_are_no_part_of_a_store_that_was_cut_short(tmp_path):
    anatomy, tokens = small_anatomy(), random_tokens(4, 16)
    wanda, magnitude = make_key(Method("wanda")), make_key(Method("magnitude"))
    build_levels(tmp_path / "alone", anatomy, tokens, magnitude)
    build_levels(tmp_path / "levels", anatomy, tokens, wanda)
    with pytest.raises(Cut):
        build_levels(tmp_path / "levels", anatomy, tokens, magnitude, on_block=cut)
    build_levels(tmp_path / "levels", anatomy, tokens, magnitude)
    name = "block-0001.safetensors"
    assert (tmp_path / "levels" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        LevelStoreError, match=r"Expected \d+ MB of room for the level store .* run the same command"
    ):
        build_levels(tmp_path / "levels", small_anatomy(), random_tokens(4, 16), make_key(Method("wanda")))
    assert not any((tmp_path / "levels").iterdir())


def test_a_damaged_store_is_named(tmp_path):
    anatomy = small_anatomy()
    build_levels(tmp_path, anatomy, random_tokens(4, 16), make_key(Method("wanda")))
    (tmp_path / "block-0001.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"Expected a block of the level store, got .*block-0001"):
        LevelStore(tmp_path, anatomy, LEVELS)
