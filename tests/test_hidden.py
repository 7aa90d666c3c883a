"""One global hidden width: which channels stay, how norms are scaled, and the models that stock classes load."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.evaluators.session import Session
from secateur.pruners.export.capability import stock_widths
from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.export.stock import stock_hidden, stock_model
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.narrow import LiveStream, count_narrow, narrow_norm, offset, stream_axes
from secateur.pruners.models.shape import model_shape
from secateur.pruners.structure.hidden import channel_scores, hidden_order
from secateur.pruners.structure.pruning import prune_structure
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.architecture.cost import cost
from secateur.spaces.measurement import Fidelity
from tests.families import FAMILIES, FEWER_HEADS, HELD_WIDTHS, VOCABULARY, WHOLE_GROUPS, make
from tests.models import random_tokens
from tests.structures import CONFIGS, build

TOKENS = random_tokens(3, 24, vocab_size=VOCABULARY - 10)
WIDTH = 24
SPACE = {"kind": "architecture", "tied": True, "units": ["heads", "channels", "hidden"], "target": 0.3}
SMALL = Fidelity("search", 128)
EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128], "test_tokens": 256}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def small(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(name)
        return model, dissect(model)


def narrowed(anatomy, narrow):
    stream = LiveStream(anatomy)
    for block in range(len(anatomy.blocks) + 1):
        stream.narrow_block(block, narrow)
    return stream


@pytest.mark.parametrize("name", HELD_WIDTHS)
def test_the_live_model_computes_what_the_stock_class_does_with_fewer_channels(name):
    model, anatomy = small(name)
    dense = logits(model)
    assert stock_hidden(anatomy, WIDTH, groups=False, queries=False) == (
        (anatomy.blocks[0].attention_units, 0),
    )
    narrow = hidden_order(anatomy, TOKENS, (WIDTH,)).at(WIDTH)
    stream = narrowed(anatomy, narrow)
    live = logits(model)
    content, weights = stock_model(CutModel(anatomy, [x.whole for x in anatomy.blocks], narrow=narrow))
    content.pop("architectures")
    stock = type(model)(type(model.config)(**content)).float().eval()
    stock.load_state_dict(weights, strict=False)
    stock.tie_weights()
    scale = float(live.abs().max())
    assert float((logits(stock) - live).abs().max()) <= 1e-5 * scale
    assert float((live - dense).abs().max()) > 0.1 * scale, "it is another model"
    n_params = sum(parameter.numel() for parameter in stock.parameters())
    assert n_params == count_narrow(anatomy, WIDTH)
    stream.restore()
    assert torch.equal(logits(model), dense)
    if not FAMILIES[name][2]:
        shape = model_shape(anatomy, 1, 4, held={"widths": {WIDTH: ()}})
        assert cost(shape, [x.whole for x in anatomy.blocks], hidden=WIDTH)["params"] == n_params


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HELD_WIDTHS])
def test_other_families_are_refused_in_one_line_or_hold_none_with_all_heads(name):
    _, anatomy = small(name)
    said = refusal(anatomy)
    if said:
        assert said.startswith("Expected ")
        assert "\n" not in said
    else:
        assert stock_hidden(anatomy, WIDTH, groups=False, queries=False) == ()
        found = stock_hidden(anatomy, 16, groups=True, queries=name not in WHOLE_GROUPS)
        assert bool(found) == (name in FEWER_HEADS)


@pytest.mark.parametrize("name", FEWER_HEADS)
def test_fewer_heads_beside_fewer_channels_are_what_the_stock_class_computes(name):
    """Where the width of all heads follows the hidden width, both are cut together."""
    model, anatomy = small(name)
    groups, queries = stock_hidden(anatomy, 16, groups=True, queries=True)[0]
    kept = [block.whole._replace(kv_groups=groups, queries=queries) for block in anatomy.blocks]
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=TOKENS, sequential=False)
    narrow = hidden_order(anatomy, TOKENS, (16,)).at(16)
    narrowed(anatomy, narrow)
    live = logits(model)
    content, weights = stock_model(CutModel(anatomy, kept, narrow=narrow))
    content.pop("architectures")
    stock = type(model)(type(model.config)(**content)).float().eval()
    stock.load_state_dict(weights, strict=False)
    stock.tie_weights()
    assert float((logits(stock) - live).abs().max()) <= 1e-5 * float(live.abs().max())


def refusal(anatomy):
    try:
        stream_axes(anatomy)
    except ValueError as error:
        return str(error)
    return ""


def test_channels_are_ranked_by_the_outputs_of_the_norms_that_mixers_read():
    anatomy = dissect(build(CONFIGS["gemma2"]))
    seen = {}
    names = [
        f"{b.name}.{n}" for b in anatomy.blocks for n in ("input_layernorm", "pre_feedforward_layernorm")
    ]
    modules = dict(anatomy.model.named_modules())
    for name in names:
        modules[name].register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(output[0].double())
        )
    for window in TOKENS:
        anatomy.model(input_ids=window[None], use_cache=False)
    wanted = sum(
        torch.stack([output.abs().mean(0) for output in seen[name]]).square().sum(0).sqrt() for name in names
    )
    assert torch.allclose(channel_scores(anatomy, TOKENS), wanted, rtol=1e-5)


def test_norms_over_fewer_channels_are_scaled_back_to_the_dense_ones():
    """Of an RMS norm the factor is near the root of kept over all mean squares."""
    anatomy = dissect(build(CONFIGS["llama"]))
    order = hidden_order(anatomy, TOKENS, (16, WIDTH))
    name = "model.layers.1.input_layernorm"
    inputs = []
    hook = dict(anatomy.model.named_modules())[name].register_forward_hook(
        lambda module, args, output: inputs.append(args[0].double())
    )
    for window in TOKENS:
        anatomy.model(input_ids=window[None], use_cache=False)
    hook.remove()
    states = torch.cat(inputs, 1)[0]
    for width in (16, WIDTH):
        narrow = order.at(width)
        kept = states[:, list(narrow.channels)]
        dense = kept / states.square().mean(1, keepdim=True).sqrt()
        own = kept / kept.square().mean(1, keepdim=True).sqrt()
        assert narrow.factors[name] == pytest.approx(
            float((dense * own).sum() / own.square().sum()), rel=1e-4
        )
        assert narrow.factors[name] > 1, "the kept channels are the larger ones"
    assert set(order.at(16).channels) < set(order.at(WIDTH).channels)


@pytest.mark.parametrize(("name", "shift"), [("llama", 0.0), ("gemma2", 1.0), ("opt", 0.0)])
def test_weights_of_norms_are_scaled_whatever_they_are_counted_from(name, shift):
    anatomy = dissect(build(CONFIGS[name]))
    norm = dict(anatomy.model.named_modules())[anatomy.final_norm]
    assert offset(norm) == shift
    hidden = torch.randn(1, 4, 32)
    whole = narrow_norm(norm, range(32), 2.0)
    bias = getattr(norm, "bias", None)
    plain = norm(hidden) - (0.0 if bias is None else bias)
    assert torch.allclose(whole(hidden) - norm(hidden), plain, atol=1e-5)


def test_the_order_is_read_back_and_made_again_for_other_tokens(tmp_path):
    anatomy, path = dissect(build(CONFIGS["llama"])), tmp_path / "hidden.safetensors"
    made = hidden_order(anatomy, TOKENS, (WIDTH,), path, "a")
    inverse = hidden_order(anatomy, TOKENS.flip(1), (WIDTH,), path, "a")
    assert torch.equal(made.order, inverse.order), "read"
    assert not torch.equal(hidden_order(anatomy, TOKENS.flip(1), (WIDTH,), path, "b").factors, made.factors)


# --- the whole way ---


def settings(**space):
    raw = {"space": {**SPACE, **space}, "evaluator": EVALUATOR, "budget": {"evaluations": 8}}
    return settings_from({**raw, "controller": {"kind": "evolution", "offspring": 4}})


def test_candidates_are_measured_as_they_are_exported(tmp_path):
    session = Session(plan(settings(statistics="dense")))
    dense = session.space.baselines()["dense"]
    session.build_levels(tmp_path / "levels")
    evaluator = session.evaluator(tmp_path / "levels")
    rng = np.random.default_rng(0)
    found = [session.space.sample(rng, 0) for _ in range(60)]
    narrow = next(x for x in found if x.hidden and x.blocks[0].queries)
    whole = next(x for x in found if not x.hidden)
    together = evaluator.evaluate([narrow.text, whole.text, dense.text], SMALL)
    assert together[2].values["kl"] == pytest.approx(0.0, abs=1e-6), "nothing leaks"
    alone = session.evaluator(tmp_path / "levels").evaluate([whole.text], SMALL)
    assert alone[0].values["kl"] == pytest.approx(together[1].values["kl"], rel=1e-6)
    fresh = Session(plan(settings(statistics="dense")))
    data = fresh.data()
    data.of(SMALL)
    fresh.pruner.prune(fresh.space.config(narrow), sequential=False)
    live, values = data.live_losses(SMALL), together[0].values
    assert live == {name: pytest.approx(values[name], rel=1e-4) for name in live}
    assert len(fresh.pruner.narrow.channels) == narrow.hidden


@pytest.mark.usefixtures("forked_reload")
def test_a_search_over_widths_ends_in_a_stock_model(tmp_path):
    app.search(settings(), tmp_path / "run")
    run = app.open_run(tmp_path / "run")
    trial = next(x for x in run.trials() if "hidden" in x.measurement.candidate)
    values, hidden = trial.measurement.values, run.candidate(trial).hidden
    summary = app.export(tmp_path / "run", trial, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == hidden
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().embedding_dim == hidden
    assert sum(p.numel() for p in again.parameters()) == values["params"]
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert record["parameters"]["saved"] == values["params"]
    assert record["indices"]["hidden"]["channels"]
    assert "structured" in summary.label
    shares, facts = run.allocation(trial), run.study.about.facts["shape"]
    removed = sum(shares[x["name"]] * x["n_weights"] for x in facts["linears"])
    dense = run.baselines["dense"].measurement.values
    outside = (4096 + 1) * (128 - hidden)  # embedding and final norm
    assert removed == pytest.approx(dense["params"] - values["params"] - outside, rel=0.02)


def test_models_that_can_t_lose_hidden_channels_are_refused():
    with pytest.raises(ValueError, match="the width of heads follows theirs"):
        stock_widths(settings().space, dissect(build(CONFIGS["gpt2"])))
