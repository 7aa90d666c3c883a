"""Whether what a search will find can be saved: asked before it begins."""

import json

import pytest

from secateur.pruners.export.capability import check_capability, check_carries, stock_kv_groups
from secateur.pruners.export.export import check_structured
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import block_shapes
from secateur.search.files import checked
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.shape import ModelShape
from tests.cut_models import MODELS, small_tokenizer
from tests.families import make

FAMILIES = ("llama", "mistral", "gemma2", "gpt2", "opt", "gpt_neox")


@pytest.fixture(scope="module")
def anatomies():
    return {family: dissect(MODELS[family]()) for family in FAMILIES}


def check(anatomy, **settings):
    check_capability(ArchitectureSettings(**settings), anatomy)


def test_blocks_of_their_own_shapes_are_refused_where_no_format_carries_them():
    config = make("gemma3 with images").config
    for refused in ({}, {"target_format": "hf"}):
        with pytest.raises(
            ValueError, match=r"got gemma3, .* Set `space.target_format` to hf-stock"
        ) as error:
            check_carries(ArchitectureSettings(**refused), config)
        assert "hf-padded" in str(error.value)
    for works in ({"target_format": "hf-stock"}, {"tied": True}, {"target_format": "hf-padded"}):
        check_carries(ArchitectureSettings(**works), config)
    check_carries(ArchitectureSettings(units=["blocks"]), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_their_own_shapes_are_free_where_code_carries_them(anatomies, family):
    for settings in ({}, {"tied": True}, {"target_format": "hf"}, {"repair": "bias"}):
        check(anatomies[family], **settings)


def test_a_bias_needs_a_place_in_the_stock_class(anatomies):
    check(anatomies["llama"], target_format="hf-stock", repair=["none", "liar"])
    for form in ("hf-stock", "hf-padded"):
        with pytest.raises(
            ValueError, match=r"no place for one, got liar\. Choose among none, refit, obs, admm"
        ):
            check(anatomies["mistral"], target_format=form, repair=["none", "liar"])


@pytest.mark.parametrize(
    ("family", "settings", "held"),
    [
        ("llama", {"tied": True}, None),
        ("llama", {"target_format": "hf"}, None),
        ("llama", {"target_format": "hf-stock"}, (4, 2, 1)),  # 6 heads do not divide the width
        ("mistral", {"target_format": "hf-stock"}, (4, 3, 2, 1)),
        ("gpt2", {"tied": True}, None),
        ("gpt2", {"target_format": "hf-stock"}, (4,)),  # whose width of a head is computed from their number
        ("gpt_neox", {"target_format": "hf-stock"}, (8,)),
    ],
)
def test_a_stock_class_takes_some_numbers_of_groups(anatomies, family, settings, held):
    assert stock_kv_groups(ArchitectureSettings(**settings), anatomies[family]) == held


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_that_a_stock_search_may_find_can_be_saved(anatomies, family):
    anatomy = anatomies[family]
    settings = ArchitectureSettings(target_format="hf-stock", target=0.25, ffn_step=12)
    shape = ModelShape(
        100_000,
        4,
        1,
        1,
        blocks=block_shapes(anatomy, 20, 4),
        held_groups=stock_kv_groups(settings, anatomy),
    )
    shape = checked(json.dumps(shape.to_json()), ModelShape, "a shape")  # as a reader of the run sees it
    levels = build_architecture(settings, (), shape).levels
    for n_groups in levels[1].kv_groups:
        for width in levels[1].ffn:
            if n_groups and width:
                check_structured(
                    anatomy, small_tokenizer(), [Kept(n_groups, width)] * len(anatomy.blocks), "hf-stock"
                )
