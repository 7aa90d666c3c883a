"""Channels within experts as units of the space `architecture`: of routed and shared ones, cut, exported, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruners.export.export import check_structured, export_structured
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.shape import model_shape
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.store import StructureKey, StructureStore, build_structure
from secateur.spaces.architecture.candidate import Architecture, Kept, read_kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from tests.cut_models import manifest, small_tokenizer
from tests.mixtures import VOCABULARY, make_mixture
from tests.test_experts_architecture import CUTTABLE

IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4_text", "ernie4_5_moe")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _kept(anatomy: Any, counts: tuple[int, int], channels: tuple[int, int]) -> list[Kept]:
    """So many experts and channels in each block; two thirds of the shared channels."""
    found = []
    for layout, n, m in zip(find_layouts(anatomy, experts=True), counts, channels, strict=True):
        block = layout.block
        if block.mixture is None:
            found.append(block.whole)
            continue
        shared = layout.mlp.shared.n_units * 2 // 3 if layout.mlp.shared else 0
        n -= n % block.mixture.n_groups
        found.append(Kept(block.attention_units, n, 0, m, shared))
    return found


def _build(
    directory: Path, anatomy: Any, importance: str = "wanda_sp", repair: str = "none"
) -> StructureStore:
    method = StructureMethod(importance, (repair,), experts="reap")
    key = StructureKey("m", "float32", "c", method, (), (4,), expert_channels=True, shared=(26, 16))
    build_structure(directory, anatomy, IDS, key)
    return StructureStore(directory, anatomy)


@pytest.mark.parametrize("name", CUTTABLE)
def test_level_of_a_store_equals_the_cut_for_good(name: str, tmp_path: Path) -> None:
    model = make_mixture(name)
    anatomy = dissect(model)
    dense = _logits(model)
    store = _build(tmp_path, anatomy)
    kept = _kept(anatomy, (6, 4), (10, 16))
    for index, of in enumerate(kept):
        store.cut(index, of)
    by_reference = _logits(model)
    assert not torch.allclose(by_reference, dense)
    for index, of in enumerate(kept):  # from one cut to a wider one, and back
        store.cut(index, of._replace(shared=of.shared + 1 if of.shared else 0))
        store.cut(index, of)
    assert torch.equal(_logits(model), by_reference)
    store.restore()
    assert torch.equal(_logits(model), dense)
    prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=IDS, sequential=False)
    torch.testing.assert_close(_logits(model), by_reference, rtol=0, atol=1e-5 * float(dense.abs().max()))
    counted = cost(model_shape(dissect(make_mixture(name)), 16, 4), kept)["params"]
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_is_exported_with_a_shape_for_each_block_and_generates_as_in_memory(
    name: str, tmp_path: Path
) -> None:
    model = make_mixture(name)
    anatomy = dissect(model)
    kept = _kept(anatomy, (6, 4), (10, 16))
    check_structured(anatomy, small_tokenizer(), kept, "hf")
    prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=IDS, sequential=False)
    report = export_structured(
        anatomy, small_tokenizer(), kept, manifest(kept, "hf"), tmp_path / "out", check_tokens=IDS[:2]
    )
    assert report.comparison.logit_error < 1e-4
    assert report.comparison.greedy_gap == 0
    assert report.manifest.parameters["saved"] == sum(p.numel() for p in model.parameters())


def test_the_removed_channels_are_those_of_least_importance() -> None:
    """Cut is zeroed: the logits are those of the model with zeros in the columns of down that go."""
    model = make_mixture("mixtral")
    anatomy = dissect(model)
    kept = [Kept(2, 6, 0, 12)] * 2
    zeroed = make_mixture("mixtral")
    other = dissect(zeroed)
    for layout in find_layouts(other, experts=True):
        for expert in layout.mlp.routed:
            down = expert.output.weight
            gone = down.float().norm(dim=0).argsort(stable=True)[:-12]
            down[:, gone] = 0
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=IDS, sequential=False)
    torch.testing.assert_close(_logits(model), _logits(zeroed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("repair", ["bias", "refit", "obs", "ream"])
@pytest.mark.parametrize("importance", ["flap", "obs", "activation"])
def test_importances_and_repairs(importance: str, repair: str, tmp_path: Path) -> None:
    model = make_mixture("qwen2_moe")
    anatomy = dissect(model)
    store = _build(tmp_path, anatomy, importance, repair)
    kept = [anatomy.blocks[0].whole, Kept(2, 4, 0, 16, 26)]
    store.cut(1, kept[1], repair)
    wanted = _logits(model)
    store.restore()
    prune_structure(anatomy, kept, importance=importance, repair=repair, tokens=IDS, sequential=False)
    torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_space_has_levels_of_experts_with_channels(name: str) -> None:
    shape = model_shape(dissect(make_mixture(name)), 16, 4)
    settings = ArchitectureSettings(units=["experts", "expert_channels"], target=0.3)
    space = build_architecture(settings, (), shape)
    uniform = space.baselines()["uniform@0.3"]
    assert space.cost(uniform)["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert Architecture.parse(uniform.text) == uniform
    assert read_kept(space.config(uniform)) == uniform.blocks
    slots = space.slots
    assert slots == (
        ("block1.mlp", "block1.shared") if name == "deepseek_v3" else ("block0.mlp", "block1.mlp")
    )
    for slot in range(len(slots)):
        usages = [space.usage(slot, option) for option in space.options(slot)]
        assert usages == sorted(usages)


def test_shared_experts_are_found_and_probed() -> None:
    for name in CUTTABLE:
        last = find_layouts(dissect(make_mixture(name)), experts=True)[-1].mlp
        assert (last.shared is not None) == (name in SHARED), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": ["expert_channels", "mlp"]}, "no mlp and no blocks in `units` with expert_channels"),
        ({"units": ["expert_channels"], "tied": True}, "where all blocks are alike"),
        ({"units": ["expert_channels"], "of": "latency_decode"}, "latency tables have no times of them"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArchitectureSettings(**changes)


def test_channels_that_are_not_there_are_refused() -> None:
    anatomy = dissect(make_mixture("mixtral"))
    for kept, message in (
        (Kept(2, 6, 0, 49), "`channels` from 1 to 48"),
        (Kept(2, 6, 0, 0, 5), "`shared` from 1 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_structure(
                anatomy, [kept] * 2, importance="magnitude", repair="none", tokens=IDS, sequential=False
            )


def test_a_text_names_channels() -> None:
    one = Architecture((Kept(3, 6, 2, 24, 32), Kept(3, 6, 0, 0, 32)))
    assert one.text == "architecture:3q2/6c24s32,3/6s32"
    assert Architecture.parse(one.text) == one
    assert one.blocks[0].plain == {"kv_groups": 3, "ffn": 6, "queries": 2, "channels": 24, "shared": 32}
