"""Experts as units of the space `architecture`: searched by reference, cut for good, exported and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruners.export.export import check_structured, export_structured
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.store import StructureKey, StructureStore, build_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from tests.cut_models import manifest, small_tokenizer
from tests.mixtures import VOCABULARY, make_mixture

IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
CUTTABLE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "llama4_text",
    "ernie4_5_moe",
    "deepseek_v2",
    "deepseek_v3",
)
RIGID = ("olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
"""Their attentions are kept as a whole: norms run over all heads, keys and values are latent, or heads have sinks."""


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _kept(anatomy: Any, counts: tuple[int, int]) -> list[Kept]:
    """So many experts of each block, and one KV group; a block without a mixture keeps half of its channels."""
    rigid = anatomy.family in RIGID
    return [
        Kept(
            block.attention_units if rigid else 1,
            n - n % block.mixture.n_groups if block.mixture else block.ffn_width // 2,
        )
        for block, n in zip(anatomy.blocks, counts, strict=True)
    ]


@pytest.mark.parametrize("name", CUTTABLE)
def test_level_of_a_store_equals_the_cut_for_good_and_the_rest_is_the_dense_model(
    name: str, tmp_path: Path
) -> None:
    model = make_mixture(name)
    anatomy = dissect(model)
    dense = _logits(model)
    method = StructureMethod("wanda_sp", ("none", "ream"), experts="reap")
    key = StructureKey("m", "float32", "c", method, (), (3, 4, 5))
    build_structure(tmp_path / "store", anatomy, IDS, key)
    store = StructureStore(tmp_path / "store", anatomy)
    kept = _kept(anatomy, (3, 5))
    for index, of in enumerate(kept):
        store.cut(index, of, "none")
    by_reference = _logits(model)
    assert not torch.allclose(by_reference, dense)
    store.restore()
    assert torch.equal(_logits(model), dense)
    units = prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=IDS, sequential=False)
    assert [len(x.channels) for x in units] == [of.ffn for of in kept]
    torch.testing.assert_close(_logits(model), by_reference, rtol=0, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize("repair", ["none", "ream", "mc_smoe", "hc_smoe"])
@pytest.mark.parametrize("importance", ["reap", "frequency", "nae"])
def test_repairs_and_importances_of_experts(repair: str, importance: str, tmp_path: Path) -> None:
    model = make_mixture("mixtral")
    anatomy = dissect(model)
    key = StructureKey(
        "m", "float32", "c", StructureMethod("wanda_sp", (repair,), experts=importance), (), (4,)
    )
    build_structure(tmp_path, anatomy, IDS, key)
    store = StructureStore(tmp_path, anatomy)
    for index in range(2):
        store.cut(index, Kept(2, 4), repair)
    wanted = _logits(model)
    store.restore()
    prune_structure(
        anatomy,
        [Kept(2, 4)] * 2,
        importance="wanda_sp",
        experts=importance,
        repair=repair,
        tokens=IDS,
        sequential=False,
    )
    torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CUTTABLE)
def test_costs_are_those_of_the_cut_model(name: str) -> None:
    model = make_mixture(name)
    anatomy = dissect(model)
    shape = model_shape(anatomy, 16, 4)
    kept = _kept(anatomy, (2, 4))
    counted = cost(shape, kept)["params"]
    prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=IDS, sequential=False)
    assert counted == sum(p.numel() for p in model.parameters())


def test_multiply_accumulates_fall_only_below_top_k() -> None:
    shape = model_shape(dissect(make_mixture("mixtral")), 16, 4)
    block = shape.blocks[0]
    expert, router = 3 * 32 * 48, 32
    assert block.macs(0, 6) - block.macs(0, 2) == 4 * router
    assert block.macs(0, 2) - block.macs(0, 1) == expert + router
    assert block.macs(0, 0) == 0


@pytest.mark.parametrize(
    ("name", "counts", "form"),
    [
        *((name, (5, 4), "hf") for name in CUTTABLE),
        ("qwen2_moe", (0, 3), "hf-stock"),
        ("deepseek_v3", (0, 4), "hf-stock"),
        ("mixtral", (4, 4), "hf-stock"),
        ("mixtral", (1, 1), "hf-stock"),
        ("gpt_oss", (4, 1), "hf"),
    ],
)
def test_exported_mixture_loads_and_generates_as_in_memory(
    name: str, counts: tuple[int, int], form: str, tmp_path: Path
) -> None:
    model = make_mixture(name)
    anatomy = dissect(model)
    kept = [
        Kept(block.attention_units, n if block.mixture else block.ffn_width)
        for block, n in zip(anatomy.blocks, counts, strict=True)
    ]
    check_structured(anatomy, small_tokenizer(), kept, form)
    prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=IDS, sequential=False)
    n_params = sum(p.numel() for p in model.parameters())
    report = export_structured(
        anatomy, small_tokenizer(), kept, manifest(kept, form), tmp_path / "out", check_tokens=IDS[:2]
    )
    assert report.comparison.logit_error < 1e-4
    assert report.comparison.greedy_gap == 0
    assert report.manifest.parameters["saved"] == n_params


def test_space_has_levels_of_experts() -> None:
    shape = model_shape(dissect(make_mixture("phimoe")), 16, 4)
    space = build_architecture(ArchitectureSettings(units=["experts"], target=0.3), (), shape)
    assert [levels.ffn for levels in space.levels] == [(6, 5, 4, 3, 2)] * 2  # its router needs two
    assert [levels.kv_groups for levels in space.levels] == [(2,)] * 2
    assert all(kept.ffn in (4, 5) for kept in space.baselines()["uniform@0.3"].blocks)
    by_default = build_architecture(ArchitectureSettings(target=0.3), (), shape)
    assert by_default.levels[1].ffn == (6, 5, 4, 3, 2, 0)


def test_experts_of_a_model_without_are_refused() -> None:
    shape = model_shape(dissect(make_mixture("qwen3_moe", mlp_only_layers=[0, 1])), 16, 4)
    with pytest.raises(ValueError, match="Expected a model with a mixture of experts for experts in `units`"):
        build_architecture(ArchitectureSettings(units=["experts"]), (), shape)
