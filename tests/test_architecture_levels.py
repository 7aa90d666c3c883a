"""Which architectures there are: levels by units and steps, and settings that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.architecture.levels import default_step
from tests.architectures import (
    BLOCK,
    TABLE,
    build,
    shape_of,
)


def test_levels_are_named_for_those_who_make_them():
    space = build(3)
    assert space.levels[0].kv_groups == (3, 2, 1)
    assert space.levels[1].kv_groups == (3, 2, 1, 0)
    assert space.levels[1].ffn == tuple(range(1536, -1, -128))
    assert build(3, of="kv_bytes").levels[1].ffn == (1536,)  # channels don't count there
    assert build(3, target_format="gguf").levels[1].ffn[-2:] == (128, 32)
    assert build(3, target_format="gguf", multiple_of=48, ffn_step=96).levels[1].ffn[-2:] == (96, 48)
    assert build(3, units=["blocks"], target=0.5).levels[1].ffn == (1536, 0)
    assert build(3, protect=[1]).levels[1].ffn == (1536,)
    assert build(3, tied=True, ffn_step=512).levels[2].ffn == (1536, 1024, 512, 0)


@pytest.mark.parametrize(
    ("width", "multiple_of", "step"),
    [
        (1536, 1, 128),
        (11008, 1, 688),
        (14336, 256, 1024),
        (176, 1, 16),
        (1009, 1, 84),
        (8, 1, 1),
        (64, 32, 32),
    ],
)
def test_steps_are_about_a_twelfth_and_divide_the_width_where_they_can(width, multiple_of, step):
    assert default_step(width, multiple_of, 12) == step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": 1.0},
            "Expected `target` from 0.0039 to 0.9896 (what attention, channels, groups, mlp can",
        ),
        ({"target": 0.5, "units": ["groups"]}, "Expected `target` from"),
        ({"target": 0.001}, "got 0.001. Choose another target"),
        ({"target": [0.3, 0.301]}, "Expected targets that the levels tell apart"),
        ({"target": 0.9, "tied": True, "units": ["channels"]}, "what equal blocks can lose"),
        (
            {"multiple_of": 7},
            "Expected `multiple_of` to divide the FFN width, got 7 for 1536 channels at block 0. Use 6.",
        ),
        (
            {"ffn_step": 1536},
            "Expected `ffn_step` below the FFN width, got 1536 for 1536 channels at block 0. Use 128.",
        ),
        ({"protect": [8]}, "Expected `protect` to hold indices of blocks from 0 to 7, got 8"),
        ({"protect": list(range(8))}, "Expected `units` that can be removed and count in params"),
        ({"of": "kv_bytes", "units": ["mlp"]}, "count in kv_bytes, got mlp"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="secateur latency MODEL"):
        build(shape=shape_of(8, None), of="latency_prefill")
    other = replace(BLOCK, ffn_width=1024)
    mixed = replace(shape_of(3, None), blocks=(BLOCK, other, BLOCK))
    assert build(shape=mixed).levels[1].ffn[0] == 1024
    with pytest.raises(ValueError, match=r"equal blocks for a tied architecture, got .* at block 1"):
        build(shape=mixed, tied=True)
    with pytest.raises(ValueError, match="got one for 3 and 1536 at block 1"):
        build(shape=replace(mixed, latency=TABLE))
    with pytest.raises(ValueError, match="known block shapes"):
        build(shape=replace(shape_of(3), blocks=()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, "Expected `space.target` within [0, 1], got 1.5"),
        ({"units": []}, "Expected `space.units` to name some"),
        ({"units": ["head_dim"]}, "units"),
        (
            {"units": ["channels", "blocks"]},
            "Expected blocks in `space.units` alone or beside attention and mlp",
        ),
        ({"units": ["mlp"], "tied": True}, "where all blocks are alike"),
        ({"units": ["attention"], "target_format": "hf-stock"}, "`target_format: hf-stock`"),
        ({"ffn_step": 0}, "Expected `space.ffn_step` to be greater than or equal to 1, got 0"),
        (
            {"ffn_step": 100, "multiple_of": 32},
            "Expected `space.multiple_of` to divide `ffn_step`, got 32 and 100",
        ),
        ({"repair": []}, "Expected `space.repair` to name some"),
        ({"repair": ["none", "none"]}, "each once"),
        ({"dampening": 0}, "Expected `space.dampening` to be greater than 0, got 0"),
        ({"of": "joules"}, "of"),
        ({"target_format": "onnx"}, "target_format"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        settings_from({"space": {"kind": "architecture", **settings}})
