"""Suggestions for unknown names."""

from __future__ import annotations

import pytest

from secateur.spaces.names import did_you_mean, nearest


@pytest.mark.parametrize(
    ("name", "meant"), [("wandaa", "wanda"), ("sparsgpt", "sparsegpt"), ("WANDA", "wanda"), ("tyni", "tiny")]
)
def test_a_near_name_is_suggested(name, meant):
    assert did_you_mean(name, ["magnitude", "wanda", "sparsegpt", "tiny"]) == f" Did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["mymetric.score", "xyz", ""])
def test_without_a_near_name_the_known_ones_are_listed(name):
    assert did_you_mean(name, ["wanda", "sparsegpt"]) == ""
    assert nearest(name, ["wanda", "sparsegpt"]) == " Known: sparsegpt, wanda."
    assert nearest(name, []) == " Known: none."
