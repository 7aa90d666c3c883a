"""Query heads cut singly, equally many of each KV group: their order, their repairs, and the models they make."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.method import StructureMethod, importance_order, query_order
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.reorder import ImportanceOrdered, reorder_by
from secateur.pruners.structure.store import StructureStore, build_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import IMPORTANCES
from tests.cut_models import cut, save
from tests.structures import CONFIGS, TOKENS, build, close, key, logits

KEPT = (Kept(2, 48, 1), Kept(1, 20, 1))


def attention_of(name="llama"):
    anatomy = dissect(build(CONFIGS[name]))
    first = next(stream_blocks(anatomy, TOKENS, outputs="gram"))
    layout = find_layouts(anatomy)[0].attention
    return anatomy, layout, first.outputs[layout.output.name]


def test_heads_are_ranked_within_their_group_by_the_scores_of_single_heads():
    _, layout, inputs = attention_of()
    for name in ("magnitude", "wanda_sp", "flap", "activation", "obs"):
        evidence = Evidence(layout, inputs, {}, 0.01)
        heads = query_order(name, evidence)
        assert heads.sort(1).values.tolist() == [[0, 1], [0, 1]]
        order = importance_order(name, Evidence(layout.of_queries(), inputs, {}, 0.01)).tolist()
        for group, row in enumerate(heads.tolist()):
            assert order.index(2 * group + row[0]) < order.index(2 * group + row[1])
    by_norm = layout.output.weight.reshape(-1, 2, 2, 8).square().sum((0, 3))
    wanted = by_norm.argsort(1, descending=True).tolist()
    assert query_order("magnitude", Evidence(layout, None, {}, 0.01)).tolist() == wanted


def test_fused_rows_count_for_their_head():
    """Sums over rows of q and columns of o are those of the same weights unfused."""
    _, layout, _ = attention_of("phi3")
    heads = layout.of_queries()
    found = Evidence(heads, None, {}, 0.0).weight_sums(lambda linear: linear.weight.square())
    fused, output = (placement.linear.weight for placement in heads.placements)
    rows = fused[: layout.output.in_features].reshape(4, 8, -1).square().sum((1, 2))
    columns = output.reshape(-1, 4, 8).square().sum((0, 2))
    assert torch.allclose(found, rows + columns, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in IMPORTANCES.items() if "perturbed" in row.gradients])
def test_importances_of_whole_groups_alone_are_refused(name):
    with pytest.raises(ValueError, match=f"scores single query heads, got {name}"):
        StructureMethod(name, heads=True)


@pytest.mark.parametrize("repair", ["refit", "obs"])
def test_repairs_lower_the_output_error(repair):
    _, layout, inputs = attention_of()
    method = StructureMethod("obs", ("none", repair), 1e-3, heads=True)
    ordered = ImportanceOrdered(layout, reorder_by(method, layout, inputs, {}, ((2, 1), (1, 1))))
    gram = inputs.second_moment.double()
    dense = layout.output.weight.double()
    for n in (2, 1):
        errors = {}
        for each in ("none", repair):
            weight = torch.zeros_like(dense)
            piece = ordered.pieces(n, each, 1)[layout.output.name].weight
            weight[:, ordered.columns(n, 1)] = piece.double()
            difference = dense - weight
            errors[each] = float((difference @ gram @ difference.T).trace())
            assert piece.shape == (32, 8 * n)
        assert errors[repair] < 0.9 * errors["none"]


def test_a_store_and_a_cut_for_good_give_the_same_model(tmp_path):
    anatomy = dissect(build(CONFIGS["llama"]))
    build_structure(
        tmp_path,
        anatomy,
        TOKENS,
        key(method=StructureMethod("obs", ("none", "obs"), heads=True), kv_groups=(1, 2), queries=(1,)),
    )
    store = StructureStore(tmp_path, anatomy)
    dense = logits(anatomy.model)
    for index, kept in enumerate(KEPT):
        store.cut(index, kept, "obs")
    got = logits(anatomy.model)
    placed = store.outputs(1, KEPT[1], "obs")["model.layers.1.self_attn.o_proj"]
    assert int((placed != 0).any(0).sum()) == 8, "one head of one group"
    store.restore()
    assert torch.equal(logits(anatomy.model), dense)
    again = dissect(build(CONFIGS["llama"]))
    units = prune_structure(again, KEPT, importance="obs", repair="obs", tokens=TOKENS, sequential=False)
    assert close(logits(again.model), got)
    assert not close(got, dense)
    assert [len(block.queries) for block in units] == [2, 1]
    assert units[1].queries[0] // 2 == units[1].kv_groups[0], "a head of the kept group"


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("repair", ["none", "obs"])
def test_weights_in_dense_shapes_give_the_logits_of_the_cut(tmp_path, repair):
    """Effects of options are foretold from these weights."""
    anatomy = dissect(build(CONFIGS["llama"]))
    of_heads = key(method=StructureMethod("obs", ("none", "obs"), heads=True), kv_groups=(1, 2), queries=(1,))
    build_structure(tmp_path, anatomy, TOKENS, of_heads)
    store = StructureStore(tmp_path, anatomy)
    dense = logits(anatomy.model)
    for kept in (Kept(2, 48, 1), Kept(1, 48), Kept(1, 20, 1)):
        store.cut(0, kept, repair)
        cut_off = logits(anatomy.model)
        store.restore()
        weights = {linear.name: linear.weight for linear in anatomy.linears}
        for name, weight in store.outputs(0, kept, repair).items():
            next(x for x in anatomy.linears if x.name == name).point_to(weight)
        assert close(logits(anatomy.model), cut_off)
        assert not close(cut_off, dense)
        for linear in anatomy.linears:
            linear.point_to(weights[linear.name])


def test_equally_many_in_all_blocks_load_with_the_stock_class(tmp_path):
    kept = (Kept(4, 48, 1),) * 4
    _, report = save("llama", kept, tmp_path / "out", form="hf-stock")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 4, 4)
    assert report.comparison.greedy_gap <= 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "LlamaForCausalLM"
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["kept"] == [{"kv_groups": 4, "ffn": 48, "queries": 1}] * 4
    first = record["indices"]["model.layers.0"]["queries"]
    assert len(first.replace("-", ",").split(",")) >= 3, "one of each group"


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("form", ["hf", "hf-padded", "gguf"])
def test_a_number_for_each_block_in_every_format(tmp_path, form):
    pytest.importorskip("gguf")
    kept = (Kept(4, 48, 1), Kept(2, 48, 1), Kept(3, 48), Kept(0, 32))
    _, report = save("llama", kept, tmp_path / "out", form=form)
    assert report.comparison.logit_error <= 1e-4


def test_as_many_as_there_are_is_none_to_cut_and_other_numbers_are_refused():
    for queries, message in ((2, "from 1 to 1"), (-1, "from 1 to 1")):
        with pytest.raises(ValueError, match=message):
            cut("llama", (Kept(4, 48, queries), *(Kept(4, 48),) * 3))
    with pytest.raises(ValueError, match="from 1 to 0 beside KV groups"):
        cut("opt", (Kept(8, 48, 1), *(Kept(8, 48),) * 3))


def test_shares_of_query_heads_fit_another_model():
    anatomy, layout, _ = attention_of()
    assert layout.share_of(1) == Fraction(1, 2)
    assert layout.query_params == 2 * 8 * 32
    assert anatomy.blocks[0].whole == Kept(2, 48)
