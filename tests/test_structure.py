"""Structure removed from live models of every family, against dense models with zeros in the same places."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
import transformers as tf

from secateur.pruners.models.check_kept import check_kept, check_splits
from secateur.pruners.models.cutting import LiveSublayer, pass_through
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.families import NAMED_ALIKE
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.shape import model_shape
from secateur.pruners.structure.pruning import prune_structure
from secateur.spaces.architecture.candidate import Kept, read_kept
from secateur.spaces.architecture.levels import LevelRules
from secateur.spaces.methods import CUT_REPAIRS
from tests.structures import CONFIGS, GROUPED, KEPT, TOKENS, build, close, logits, make_case


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def case(request, cases):
    found = cases[request.param]
    yield found
    found.surgeon.restore()


@pytest.fixture
def llama(cases):
    yield cases["llama"]
    cases["llama"].surgeon.restore()


def zeroed(case, blocks):
    """The dense model with zeros in the output projections' columns of all that is not kept.

    A block that keeps nothing, and would still norm the stream, gives what it gets.
    """
    model = deepcopy(case.model)
    for layout, kept in zip(case.store.layouts, blocks, strict=True):
        for part, n_kept in ((layout.attention, kept.kv_groups), (layout.mlp, kept.ffn)):
            output = part.output
            module = model.get_submodule(output.name)
            weight = module.weight.T if output.transposed else module.weight
            order = case.store.ordered(layout.block.index, part.kind).order
            for unit in order[n_kept:]:
                weight[:, unit * part.unit_width : (unit + 1) * part.unit_width] = 0.0
            if n_kept == 0 and module.bias is not None:
                module.bias.zero_()
        if not any(kept.units) and not layout.vanishes:
            pass_through(model.get_submodule(layout.block.name))
    return model


def test_every_family_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(NAMED_ALIKE)


# Where units are ------------------------------------------------------------------------------------------


def test_units_can_stand_in_any_order(case):
    for layout in case.store.layouts:
        for part in layout.sublayers:
            pieces = case.store.ordered(layout.block.index, part.kind).pieces(part.n_units, "none")
            LiveSublayer(part).cut(part.n_units, pieces)
    assert any(
        case.store.ordered(0, kind).order != tuple(sorted(case.store.ordered(0, kind).order))
        for kind in ("attention", "mlp")
    )
    assert torch.allclose(
        logits(case.model), case.dense, rtol=1e-5, atol=2e-6 * float(case.dense.abs().max())
    )


def test_fused_projections_are_told_apart(cases):
    parts = {
        name: [tuple(p.parts) for part in cases[name].store.layouts[1].sublayers for p in part.placements]
        for name in ("phi3", "gpt2", "gpt_neox")
    }
    assert parts == {
        "phi3": [(16, 8, 8), (16,), (1, 1), (1,)],
        "gpt2": [(8, 8, 8), (8,), (1,), (1,)],
        "gpt_neox": [(24,), (8,), (1,), (1,)],
    }


def test_norms_go_with_the_sublayer_that_they_serve(cases):
    numbers = {
        name: [len(part.norms) for part in case.store.layouts[1].sublayers] for name, case in cases.items()
    }
    assert numbers == {
        **{name: [1, 1] for name in CONFIGS},
        "qwen3": [3, 1],  # those of q and k
        "gemma2": [2, 2],  # before and behind
        "opt-post-norm": [0, 0],  # of the whole stream
    }


def test_attention_whose_heads_are_not_alike_or_not_independent_is_kept_or_removed_as_a_whole():
    for config in (tf.Olmo2Config(**GROUPED), tf.StableLmConfig(**GROUPED, qk_layernorm=True)):
        anatomy = dissect(build(config))
        dense = logits(anatomy.model)
        assert [layout.attention.rigid for layout in find_layouts(anatomy)] == [True, True]
        assert torch.equal(logits(anatomy.model), dense)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        said = r"`kv_groups` 0 or 2 at model.layers.1, .* kept or removed as a whole, got 1"
        with pytest.raises(ValueError, match=said):
            prune_structure(
                anatomy,
                [Kept(2, 20), Kept(1, 48)],
                importance="magnitude",
                repair="none",
                tokens=tokens,
                sequential=False,
            )
        shape = model_shape(anatomy, 8, 4)
        rules = LevelRules(frozenset({"groups", "channels", "attention"}), ffn_step=16)
        assert [of.kv_groups for of in rules.levels(shape)] == [(2,), (2, 0)]
        assert [of.ffn for of in rules.levels(shape)] == [(48, 32, 16)] * 2


# Cuts -----------------------------------------------------------------------------------------------------


CUTS = [(KEPT, Kept(1, 47)), (Kept(2, 5), Kept(0, 20)), (Kept(1, 0), Kept(0, 0))]


@pytest.mark.parametrize("blocks", CUTS)
def test_a_cut_model_is_the_dense_one_with_zeros(case, blocks):
    wanted = logits(zeroed(case, blocks))
    for block, kept in enumerate(blocks):
        case.surgeon.cut(block, kept)
    assert close(logits(case.model), wanted)
    assert not close(wanted, case.dense)


@pytest.mark.parametrize("blocks", CUTS)
def test_a_cut_model_computes_with_a_cache_what_it_computes_without(case, blocks):
    for block, kept in enumerate(blocks):
        case.surgeon.cut(block, kept)
    cache = tf.DynamicCache(config=case.model.config)
    with torch.no_grad():
        steps = [
            case.model(part, past_key_values=cache).logits for part in TOKENS[:2].split([7, 1, 4], dim=1)
        ]
    assert close(torch.cat(steps, 1), logits(case.model, TOKENS[:2]))


def test_a_cut_model_generates_with_a_cache_what_it_generates_without(cases):
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt, mask = TOKENS[:2, :7], torch.ones(2, 7, dtype=torch.long)
    for name in ("llama", "gemma2", "opt"):
        case = cases[name]
        case.surgeon.cut(0, Kept(1, 0))
        case.surgeon.cut(1, Kept(0, 20))
        cached, plain = (
            case.model.generate(prompt, attention_mask=mask, use_cache=use_cache, **how)
            for use_cache in (True, False)
        )
        case.surgeon.restore()
        assert torch.equal(cached, plain)


def test_the_cache_has_its_length_where_the_first_full_attention_of_several_is_gone():
    config = deepcopy(CONFIGS["gemma2"])
    config.num_hidden_layers, config.layer_types = 4, ["sliding_attention", "full_attention"] * 2
    anatomy = dissect(build(config))
    prune_structure(
        anatomy,
        [Kept(2, 48), Kept(0, 48), Kept(2, 48), Kept(2, 48)],
        importance="magnitude",
        repair="none",
        tokens=TOKENS,
        sequential=False,
    )
    cache = tf.DynamicCache(config=anatomy.model.config)
    with torch.no_grad():
        steps = [anatomy.model(part, past_key_values=cache).logits for part in TOKENS[:1].split(1, dim=1)]
    assert close(torch.cat(steps, 1), logits(anatomy.model, TOKENS[:1]))


def test_restoring_gives_the_same_tensors_back(case):
    def state():
        modules = dict(case.model.named_modules())
        return {
            "data": {name: (id(p), p.data_ptr(), p.shape) for name, p in case.model.named_parameters()},
            "plain": {
                name: {k: v for k, v in vars(module).items() if isinstance(v, int)}
                for name, module in modules.items()
            },
            "configs": {name: id(getattr(module, "config", None)) for name, module in modules.items()},
            "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        }

    before = state()
    for kept in (KEPT, Kept(1, 0), Kept(1, 10)):
        case.surgeon.cut(0, kept, "bias")
        case.surgeon.cut(1, Kept(0, kept.ffn), "obs")
        assert state() != before
    case.surgeon.restore()
    assert state() == before
    assert torch.equal(logits(case.model), case.dense)


def test_keeping_all_is_the_dense_block_under_every_repair(case):
    for repair in CUT_REPAIRS:
        case.surgeon.cut(0, KEPT, repair)
        case.surgeon.cut(0, Kept(case.anatomy.blocks[0].n_kv_heads, 48), repair)
        assert torch.equal(logits(case.model), case.dense)


def test_a_level_is_a_view_of_the_stores_weights(llama):
    llama.surgeon.cut(0, KEPT)
    for part in llama.store.layouts[0].sublayers:
        whole = llama.store.ordered(0, part.kind).pieces(part.n_units, "none")
        for placement in part.placements:
            linear = placement.linear
            assert linear.weight.data_ptr() == whole[linear.name].weight.data_ptr()
            assert linear.weight.shape[placement.axis] < whole[linear.name].weight.shape[placement.axis]


def test_modules_say_the_sizes_that_they_have(cases):
    for name in ("llama", "gpt2"):
        cases[name].surgeon.cut(1, KEPT)
        for linear in cases[name].anatomy.blocks[1].linears:
            sizes = vars(linear.module)
            told = (sizes.get("nf", sizes.get("out_features")), sizes.get("nx", sizes.get("in_features")))
            assert told == tuple(linear.weight.shape)
        cases[name].surgeon.restore()


def test_copies_of_a_cut_model_stay_cut_when_it_is_restored(llama):
    llama.surgeon.cut(0, Kept(1, 0))
    llama.surgeon.cut(1, Kept(0, 20), "bias")
    wanted = logits(llama.model)
    copies = deepcopy(llama.model), pickle.loads(pickle.dumps(llama.model))
    llama.surgeon.restore()
    assert all(torch.equal(logits(copy), wanted) for copy in copies)


def test_parameters_of_units_and_sublayers_add_up(case):
    dense = sum(p.numel() for p in case.model.parameters())
    parts = case.store.layouts[1].sublayers
    for kept in (Kept(1, 20), Kept(0, 7), Kept(1, 0), Kept(0, 0)):
        case.surgeon.cut(1, kept)
        gone = 0
        for part, n_kept in zip(parts, (kept.kv_groups, kept.ffn), strict=True):
            live = sum(p.numel() for m in part.modules for p in m.parameters(recurse=False))
            case.surgeon.restore()
            gone += (part.n_units - n_kept) * part.unit_params + (part.fixed_params if n_kept == 0 else 0)
            assert live == part.n_units * part.unit_params + part.fixed_params - (
                (part.n_units - n_kept) * part.unit_params + (part.fixed_params if n_kept == 0 else 0)
            )
            case.surgeon.cut(1, kept)
        assert dense - sum(p.numel() for p in case.model.parameters()) == gone


def test_cuts_that_are_not_possible_are_named(llama):
    for block, kept, message in (
        (0, Kept(0, 48), "`kv_groups` from 1 to 2, got 0 at model.layers.0"),
        (1, Kept(3, 48), "`kv_groups` from 0 to 2, got 3"),
        (1, Kept(1, 49), "`ffn` from 0 to 48, got 49"),
    ):
        with pytest.raises(ValueError, match=message):
            llama.surgeon.cut(block, kept)
    with pytest.raises(ValueError, match=r"repair 'obs' was prepared, got 21 of 48 units .*the mlp of model"):
        llama.surgeon.cut(0, Kept(2, 21), "obs")
    with pytest.raises(ValueError, match="`blocks` for the 2 blocks of the model, got 1"):
        check_kept(llama.anatomy, [KEPT])


def test_kept_is_read_from_a_plain_configuration():
    config = {"blocks": [{"kv_groups": 1, "ffn": 20}, {"kv_groups": 0, "ffn": 0}], "repair": "none"}
    assert read_kept(config) == (Kept(1, 20), Kept(0, 0))


# Removal for good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", CUT_REPAIRS)
def test_removal_by_dense_statistics_is_what_the_store_holds(case, repair):
    blocks = (KEPT, Kept(0, 10))
    for block, kept in enumerate(blocks):
        case.surgeon.cut(block, kept, repair)
    wanted = logits(case.model)
    n_params = sum(p.numel() for p in case.model.parameters())
    case.surgeon.restore()
    pruned = dissect(deepcopy(case.model))
    units = prune_structure(
        pruned, blocks, importance="wanda_sp", repair=repair, tokens=TOKENS, sequential=False
    )
    assert close(logits(pruned.model), wanted)
    assert sum(p.numel() for p in pruned.model.parameters()) == n_params
    for parameter in pruned.model.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    orders = [[case.store.ordered(block, kind).order for kind in ("attention", "mlp")] for block in (0, 1)]
    assert [(unit.kv_groups, unit.channels) for unit in units] == [
        (groups[: kept.kv_groups], channels[: kept.ffn])
        for (groups, channels), kept in zip(orders, blocks, strict=True)
    ]


def test_sequential_removal_looks_at_the_blocks_that_are_cut_already(llama):
    def second(sequential, n_first):
        anatomy = dissect(deepcopy(llama.model))
        done = []
        prune_structure(
            anatomy,
            (Kept(1, n_first), KEPT),
            importance="wanda_sp",
            repair="obs",
            tokens=TOKENS,
            sequential=sequential,
            on_block=done.append,
        )
        assert done == [0, 1]
        return [linear.weight for linear in anatomy.blocks[1].linears]

    def same(one, other):
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(second(False, 4), second(False, 40))
    assert not same(second(True, 4), second(True, 40))


def test_a_block_that_is_kept_whole_is_left_alone(llama):
    pruned = dissect(deepcopy(llama.model))
    units = prune_structure(
        pruned, (Kept(2, 48), KEPT), importance="obs", repair="obs", tokens=TOKENS, sequential=True
    )
    assert (units[0].kv_groups, units[0].channels) == ((0, 1), tuple(range(48)))
    for ours, dense in zip(pruned.blocks[0].linears, llama.anatomy.blocks[0].linears, strict=True):
        assert torch.equal(ours.weight, dense.weight)


def test_a_block_of_each_kind_is_probed():
    """The second block's channels depend on each other: a softmax runs over them."""
    model = build(tf.LlamaConfig(**GROUPED))
    assert [x.mlp.rigid for x in find_layouts(dissect(model))] == [False, False]
    model.model.layers[1].mlp.act_fn = torch.nn.Softmax(-1)
    assert [x.mlp.rigid for x in find_layouts(dissect(model))] == [False, True]
    kept = [Kept(2, 48), Kept(2, 20)]
    with pytest.raises(ValueError, match=r"Expected `ffn` 0 or 48 at model.layers.1, .* as a whole, got 20"):
        check_splits(find_layouts(dissect(model)), kept)
