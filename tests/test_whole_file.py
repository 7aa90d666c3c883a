"""Files that are written whole or not at all."""

from __future__ import annotations

import pytest

from secateur.spaces.whole_file import whole_file


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_halfway(path):
    with whole_file(path) as new:
        new.write_text("ne")
        raise OSError("no room")


@pytest.mark.parametrize("existing", [True, False])
def test_after_an_error_nothing_is_changed(tmp_path, existing):
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("old")
    with pytest.raises(OSError, match="no room"):
        fail_halfway(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * existing
