"""Streamed pruning: equal to that of the whole model bit for bit, and its memory."""

from __future__ import annotations

import weakref

import pytest
import torch

from secateur.pruners.calibration.collected import walk_dense
from secateur.pruners.export.manifest import check_files
from secateur.pruners.export.saving import unfinished
from secateur.pruners.models.mapped import load_mapped
from secateur.pruners.recipes.weights import weights_by_block
from secateur.search import app
from secateur.search.app.candidate_file import CandidateFile
from secateur.spaces.recipe.form import completed
from tests.recipe_contexts import CALIBRATION, small_context
from tests.streaming import FEW, check_equal, recipe, saved

SLIDING = {"sliding_window": 8, "query_pre_attn_scalar": 8}


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize(
    ("kind", "changes", "stored", "dtype", "metric", "repair"),
    [
        ("llama", {"tie_word_embeddings": True}, torch.bfloat16, "float32", "wanda", "none"),
        ("llama", {"tie_word_embeddings": False}, torch.float32, "float32", "sparsegpt", "none"),
        ("gemma2", SLIDING, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("gemma2", SLIDING, torch.bfloat16, "float32", "sparsegpt", "none"),
        ("gpt2", {}, torch.float32, "bfloat16", "magnitude", "none"),
        ("gpt2", {}, torch.float32, "float32", "wanda", "obs"),
        ("gpt_oss", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("mixtral", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("mixtral", {}, torch.float32, "float32", "wanda", "none"),
        ("qwen3_moe", {}, torch.float32, "float32", "wanda", "none"),
        ("granitemoe", {}, torch.bfloat16, "bfloat16", "magnitude", "none"),
        ("phimoe", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("deepseek_v3", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("llama4_text", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
    ],
)
def test_the_result_is_that_of_the_whole_model(tmp_path, kind, changes, stored, dtype, metric, repair):
    model = saved(tmp_path / "model", kind, stored, **changes)
    for stream in ("never", "always"):
        few = FEW | {"loading": {"dtype": dtype}}
        app.prune(recipe(metric, repair=repair), str(model), tmp_path / stream, **few, stream=stream)
    check_equal(tmp_path / "never", tmp_path / "always")
    assert check_files(tmp_path / "always") > len(list((tmp_path / "always").glob("*.safetensors")))
    assert not unfinished(tmp_path / "always").exists()


def candidate(metric: str, statistics: str) -> CandidateFile:
    """Half of the weights of attention and a quarter of those of MLPs, as a search finds them."""
    row = {"attention": {"q_proj": 0.5}, "mlp": {"up_proj": 0.25}}
    space = {"kind": "allocation", "metric": metric, "statistics": statistics, "target": 0.4}
    data = {"text": "docs", "tokens": 64, "window": 32}
    return CandidateFile.model_validate(
        {"space": space, "candidate": {"blocks": [row, row]}, "calibration": data}
    )


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize(
    ("metric", "statistics"), [("wanda", "sequential"), ("sparsegpt", "sequential"), ("wanda", "dense")]
)
def test_so_is_that_of_a_found_allocation(tmp_path, metric, statistics):
    model = saved(tmp_path / "model", "llama")
    for stream in ("never", "always"):
        file = candidate(metric, statistics)
        assert file.sequential == (statistics == "sequential")
        app.prune(file, str(model), tmp_path / stream, **FEW, stream=stream)
    check_equal(tmp_path / "never", tmp_path / "always", share=0.35)


# --- memory ---


def test_the_next_block_is_read_beside_the_work_and_given_back(tmp_path):
    loaded = load_mapped(str(saved(tmp_path / "model", "llama", torch.bfloat16)))
    anatomy = loaded.dissect()
    stored = [linear.weight.data_ptr() for linear in anatomy.linears]
    for block in anatomy.blocks:
        with anatomy.hold(block):
            assert {linear.weight.dtype for linear in block.linears} == {torch.float32}
            others = [x for other in anatomy.blocks if other is not block for x in other.linears]
            assert {linear.weight.dtype for linear in others} == {torch.bfloat16}
            ahead = anatomy.hold._ahead
            assert (ahead is None) == (block is anatomy.blocks[-1])
            if ahead is not None:
                read = ahead.result()
                weights = list(anatomy.blocks[block.index + 1].module.parameters())
                assert all(torch.equal(x, p.data.float()) for x, p in zip(read, weights, strict=True))
            block.linears[0].point_to(torch.zeros_like(block.linears[0].weight))
    assert [linear.weight.data_ptr() for linear in anatomy.linears] == stored
    with anatomy.hold(anatomy.blocks[2]), pytest.raises(ZeroDivisionError), anatomy.hold(anatomy.blocks[0]):
        raise ZeroDivisionError
    assert [linear.weight.data_ptr() for linear in anatomy.linears] == stored


@pytest.mark.parametrize("metric", ["wanda", "sparsegpt"])
def test_nothing_of_a_pruned_block_is_kept(tmp_path, metric):
    context = small_context(tmp_path, n_layers=2)
    form = {"unit": "weights", "sparsity": 0.5, "metric": {"name": metric}, "calibration": CALIBRATION}
    pruning = weights_by_block(context, completed(form))
    [_, statistics] = walk_dense(context.anatomy, pruning.tokens, gram=pruning.detail == "gram")
    block = context.anatomy.blocks[1]
    pruning.prune(block, statistics)
    of_block = [*statistics.values(), *(linear.module.weight.data for linear in block.linears)]
    alive = [weakref.ref(x.untyped_storage()) for x in of_block]
    assert float((of_block[-1] == 0).float().mean()) == 0.5
    del statistics, of_block
    for linear in block.linears:
        linear.module.weight.data = torch.empty(0)
    assert [x() for x in alive] == [None] * len(alive)
