"""Training that may be continued: Tune's pickles run code, so that those of others must not be read."""

from __future__ import annotations

import shutil

import pytest

from secateur.search.errors import UsageError
from secateur.search.recovery.own_training import TOKEN, claim


def test_what_was_begun_here_goes_on_even_when_it_is_moved(tmp_path):
    place, records = tmp_path / "run" / "tune-1", tmp_path / "cache"
    for _ in range(2):
        claim(place, records)
        (place / "tuner.pkl").write_bytes(b"state")
    (tmp_path / "run").rename(tmp_path / "moved")
    claim(tmp_path / "moved" / "tune-1", records)


def test_a_killed_beginning_is_begun_again(tmp_path):
    place, records = tmp_path / "tune-1", tmp_path / "cache"
    claim(place, records)
    (place / TOKEN).unlink()
    claim(place, records)
    (place / "tuner.pkl").write_bytes(b"state")
    claim(place, records)


@pytest.mark.parametrize("token", [None, "", "0" * 32, "copied"])
def test_what_came_from_elsewhere_is_refused(tmp_path, token):
    own, place, records = tmp_path / "own", tmp_path / "tune-1", tmp_path / "cache"
    claim(own, records)
    if token == "copied":
        shutil.copytree(own, place)
    else:
        place.mkdir()
        if token is not None:
            (place / TOKEN).write_text(token)
    (place / "tuner.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UsageError, match=r"begun here, got .*tune-1 from elsewhere.*Remove it to train anew"):
        claim(place, records)
