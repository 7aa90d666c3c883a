"""The structure store, importances of units, and what repairs do to a live model."""

from __future__ import annotations

import weakref
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from secateur.pruners.calibration.gradient_kinds import KINDS
from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.pass_kinds import CONTRAST_KINDS, PASS_KINDS
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.stores.block_files import LevelStoreError, is_built
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.method import StructureMethod, importance_order
from secateur.pruners.structure.reorder import ImportanceOrdered, reorder_by
from secateur.pruners.structure.store import StructureStore, build_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import CUT_REPAIRS, IMPORTANCES
from tests.structures import CHANNELS, REPAIR_NAMES, TOKENS, key, logits, make_case, take_few_passes

NAMES = ("llama", "llama-biased", "qwen2", "phi3", "opt", "gpt_neox")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture
def llama(cases):
    yield cases["llama"]
    cases["llama"].surgeon.restore()


# The store ------------------------------------------------------------------------------------------------


def test_a_build_that_was_cut_short_goes_on(tmp_path, llama):
    class StopError(Exception):
        pass

    def stop(index):
        raise StopError

    with pytest.raises(StopError):
        build_structure(tmp_path, llama.anatomy, TOKENS, key(), on_block=stop)
    assert not is_built(tmp_path, key())
    first = tmp_path / "block-0000.safetensors"
    before = first.stat().st_mtime_ns
    build_structure(tmp_path, llama.anatomy, TOKENS, key())
    assert is_built(tmp_path, key())
    assert first.stat().st_mtime_ns == before
    for name in ("block-0000.safetensors", "block-0001.safetensors"):
        assert (tmp_path / name).read_bytes() == (llama.directory / name).read_bytes()


def test_a_store_of_another_key_is_built_again(tmp_path, llama):
    one, other = key(repairs=("none",)), key(repairs=("none",), importance="magnitude")
    build_structure(tmp_path, llama.anatomy, TOKENS, one)
    assert is_built(tmp_path, one)
    assert not is_built(tmp_path, other)
    for change in (
        {"ffn": (10,)},
        {"dampening": 0.1},
        {"calibration": "d"},
        {"model": "n"},
        {"kv_groups": ()},
    ):
        assert key(repairs=("none",), **change).digest != one.digest
    before = (tmp_path / "block-0000.safetensors").read_bytes()
    build_structure(tmp_path, llama.anatomy, TOKENS, other)
    assert is_built(tmp_path, other)
    assert (tmp_path / "block-0000.safetensors").read_bytes() != before


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LevelStoreError, match=r"Expected \d+ MB of room .* use fewer levels or repairs"):
        build_structure(tmp_path, llama.anatomy, TOKENS, key())
    assert list(tmp_path.iterdir()) == []


def test_names_and_dampening_are_checked():
    with pytest.raises(ValueError, match="Did you mean 'flap'"):
        key(importance="flip")
    with pytest.raises(ValueError, match="Did you mean 'refit'"):
        key(repairs=("refitt",))
    with pytest.raises(ValueError, match="`dampening` > 0, got 0"):
        key(dampening=0.0)


def test_statistics_of_one_block_are_gone_when_the_next_comes(llama):
    seen = []
    for part in stream_blocks(llama.anatomy, TOKENS, outputs="gram"):
        assert all(reference() is None for reference in seen)
        seen = [weakref.ref(statistics) for statistics in part.outputs.values()]
        del part
    assert len(seen) == 2


# Importances ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence(cases):
    """Of the sub-layers of the second block of three families, with gradients."""
    found = []
    for name in ("qwen2", "phi3", "gpt_neox"):
        anatomy, layouts = cases[name].anatomy, cases[name].store.layouts
        with pytest.MonkeyPatch.context() as monkeypatch:
            take_few_passes(monkeypatch)
            kinds = (*KINDS, *PASS_KINDS, *CONTRAST_KINDS)
            gradients = collect_gradients(anatomy, TOKENS, kinds, contrast=TOKENS.flip(1))
        *_, last = stream_blocks(anatomy, TOKENS, outputs="gram")
        found += [
            Evidence(part, last.outputs[part.output.name], gradients, 0.01) for part in layouts[1].sublayers
        ]
    return found


@pytest.mark.parametrize("name", IMPORTANCES)
def test_an_importance_orders_all_units(evidence, name):
    for given in evidence:
        score = IMPORTANCES[name].function(given)
        order = importance_order(name, given)
        assert sorted(order.tolist()) == list(range(given.layout.n_units))
        assert (score[order].diff() <= 0).all()
        assert score.unique().numel() > 1


def inputs_of(case, name):
    """What a projection of the second block sees: windows, length, features."""
    seen = []
    module = case.model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    logits(case.model)
    hook.remove()
    return seen[0].reshape(*TOKENS.shape, -1)


def test_importances_by_hand(cases, evidence):
    qwen = cases["qwen2"]
    for given in evidence[:2]:
        layout = given.layout
        x, w = inputs_of(qwen, layout.output.name), layout.output.weight.double()
        rows, units = x.flatten(0, 1), layout.n_units
        by_hand = {
            "wanda_sp": (w.abs().mean(0) * rows.square().mean(0).sqrt()).reshape(units, -1).mean(1),
            "flap": (w.square().sum(0) * rows.var(0, correction=0)).reshape(units, -1).mean(1),
            "activation": x.abs().mean(1).square().sum(0).reshape(units, -1).sum(1).sqrt(),
            "magnitude": w.reshape(32, units, -1).norm(dim=(0, 2)),
        }
        for name, wanted in by_hand.items():
            assert torch.allclose(IMPORTANCES[name].function(given).double(), wanted, rtol=1e-4), name


def test_taylor_sums_over_all_that_a_unit_owns(evidence):
    attention, mlp = evidence[2:4]  # of Phi3, fused
    effects = {
        placement.linear.role: (placement.linear.weight.abs() * given.gradients["rms"][placement.linear.name])
        for given in (attention, mlp)
        for placement in given.layout.placements
    }
    qkv, o, gate_up, down = (effects[role] for role in ("qkv", "o", "gate_up", "down"))
    group = qkv[:16].sum() + qkv[32:40].sum() + qkv[48:56].sum() + o[:, :16].sum()
    channel = gate_up[5].sum() + gate_up[48 + 5].sum() + down[:, 5].sum()
    assert torch.isclose(IMPORTANCES["taylor"].function(attention)[0], group)
    assert torch.isclose(IMPORTANCES["taylor"].function(mlp)[5], channel)


@pytest.mark.parametrize("name", ["taylor", "bonsai"])
def test_a_store_can_be_ordered_by_what_is_known_of_the_whole_model(tmp_path, llama, monkeypatch, name):
    take_few_passes(monkeypatch)
    build_structure(tmp_path / "s", llama.anatomy, TOKENS, key(name, ("none",)))
    store = StructureStore(tmp_path / "s", llama.anatomy)
    gradients = collect_gradients(llama.anatomy, TOKENS, IMPORTANCES[name].gradients, contrast=TOKENS.flip(1))
    part = llama.store.layouts[0].mlp
    wanted = importance_order(name, Evidence(part, None, gradients, 0.01))
    assert store.ordered(0, "mlp").order == tuple(wanted.tolist())


def test_scores_that_are_not_finite_name_the_sublayer(evidence):
    bad = deepcopy(evidence[1].inputs)
    bad.sum_squares[3] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity at the mlp of model.layers.1"):
        importance_order("wanda_sp", Evidence(evidence[1].layout, bad, {}, 0.01))


# Repairs of live models -----------------------------------------------------------------------------------


def output_error(case, part, tensors, n_kept, repair):
    """Mean squared difference between the cut and the dense output projection on the calibration tokens."""
    x, w = inputs_of(case, part.output.name), part.output.weight.double()
    ordered = ImportanceOrdered(part, tensors)
    columns = part.placements[-1].index(torch.tensor(ordered.order))[: n_kept * part.unit_width]
    piece = ordered.pieces(n_kept, repair)[part.output.name]
    bias = 0.0 if part.output.module.bias is None else part.output.module.bias.double()
    cut_bias = 0.0 if piece.bias is None else piece.bias.double()
    difference = x @ w.T + bias - x[..., columns] @ piece.weight.double().T - cut_bias
    return float(difference.square().mean())


def test_repairs_lower_the_output_error_and_obs_orders_best(cases):
    """OBS is greedy: in every case here it is at least as good as the best other order, repaired alike."""
    for name in ("llama", "opt"):
        case = cases[name]
        *_, last = stream_blocks(case.anatomy, TOKENS, outputs="gram")
        part = case.store.layouts[1].mlp
        for n_kept in CHANNELS:
            errors = {}
            for importance in ("wanda_sp", "flap", "obs"):
                method = StructureMethod(importance, REPAIR_NAMES, 1e-3)
                tensors = reorder_by(method, part, last.outputs[part.output.name], {}, ((n_kept, 0),))
                for repair in CUT_REPAIRS:
                    errors[importance, repair] = output_error(case, part, tensors, n_kept, repair)
                plain = errors[importance, "none"]
                assert errors[importance, "bias"] < plain
                assert max(errors[importance, "refit"], errors[importance, "obs"]) < 0.8 * plain
            others = [
                error
                for (importance, repair), error in errors.items()
                if importance != "obs"
                and CUT_REPAIRS[repair].gives != "both"  # with a bias, too, more can be had
            ]
            assert errors["obs", "obs"] <= min(others)


def test_a_bias_repair_gives_a_bias_where_there_was_none_and_adds_to_one_that_is(cases):
    for name in ("llama", "llama-biased"):
        case = cases[name]
        output = case.store.layouts[0].mlp.output
        before = torch.zeros(32) if output.module.bias is None else output.module.bias.clone()
        mean = inputs_of(case, output.name).mean((0, 1))
        gone = torch.tensor(case.store.ordered(0, "mlp").order[20:])
        wanted = before + (output.weight.double()[:, gone] @ mean[gone]).float()
        case.surgeon.cut(0, Kept(2, 20), "bias")
        assert torch.allclose(output.module.bias, wanted, atol=1e-5)
        case.surgeon.restore()
        assert (output.module.bias is None) == (name == "llama")


# Allocations ----------------------------------------------------------------------------------------------


def test_scores_for_allocations_by_hand(cases):
    case = cases["opt"]
    scores = case.store.scores
    hidden = []
    hooks = [
        block.module.register_forward_hook(lambda *args: hidden.append(args)) for block in case.anatomy.blocks
    ]
    logits(case.model)
    for hook in hooks:
        hook.remove()
    for block, (_, inputs, output) in enumerate(hidden):
        x, y = (tensor.flatten(0, 1) for tensor in (inputs[0], output))
        cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        assert scores.influence[block] == pytest.approx(float(1 - cosine.mean()), rel=1e-4)
    for part, given in zip(
        case.store.layouts[1].sublayers, (scores.attention[1], scores.mlp[1]), strict=True
    ):
        rows = inputs_of(case, part.output.name).flatten(0, 1)
        columns = part.output.weight.double().square().sum(0) * rows.var(0, correction=0)
        standard = (columns - columns.mean()) / columns.std(correction=0)
        assert given == pytest.approx(standard.reshape(part.n_units, -1).mean(1).tolist(), abs=1e-4)


def test_scores_for_allocations_depend_on_nothing_that_the_key_chooses(tmp_path, llama):
    build_structure(tmp_path, llama.anatomy, TOKENS, key("magnitude", ("none",)))
    assert StructureStore(tmp_path, llama.anatomy).scores == llama.store.scores
