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
from secateur.pruners.export.export import check_structured, export_structured
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.export.stock import stock_hidden, stock_model
from secateur.pruners.models.cutting import set_bias
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.live_experts import live_part
from secateur.pruners.models.narrow import LiveStream, Narrow, narrow_norm, offset
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.models.stream_axes import stream_axes
from secateur.pruners.structure.hidden import channel_scores, hidden_order
from secateur.pruners.structure.pruner import ArchitecturePruner
from secateur.pruners.structure.pruning import prune_structure
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.architecture.cost import cost
from secateur.spaces.measurement import Fidelity
from secateur.spaces.registry import SPACES
from tests.cut_models import manifest, small_tokenizer
from tests.families import PLAIN, make
from tests.family_configs import VOCABULARY
from tests.family_table import FEWER_HEADS, HALF_WIDTHS, HELD_WIDTHS, NO_WIDTHS, WHOLE_GROUPS
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


def width_of(name):
    return 16 if name in HALF_WIDTHS else WIDTH


@pytest.mark.parametrize("name", HELD_WIDTHS)
def test_the_live_model_computes_what_the_stock_class_does_with_fewer_channels(name):
    model, anatomy = small(name)
    dense, width = logits(model), width_of(name)
    assert len(stock_hidden(anatomy, width, groups=False, queries=False)) == 1
    assert bool(stock_hidden(anatomy, WIDTH, groups=False, queries=False)) == (name not in HALF_WIDTHS)
    narrow = hidden_order(anatomy, TOKENS, (width,)).at(width)
    stream = narrowed(anatomy, narrow)
    live = logits(model)
    assert not torch.allclose(live, dense, atol=0.05 * float(dense.abs().max())), "it is another model"
    stock, weights = stock_of(anatomy, narrow)
    scale = float(live.abs().max())
    assert float((logits(stock) - live).abs().max()) <= 1e-5 * scale
    n_params = sum(parameter.numel() for parameter in stock.parameters())
    assert n_params == sum(weights[own].numel() for own, _ in stock.named_parameters() if own in weights)
    stream.restore()
    assert torch.equal(logits(model), dense)
    shape = model_shape(anatomy, 1, 4, held={"widths": {width: ()}})
    assert cost(shape, [x.whole for x in anatomy.blocks], hidden=width)["params"] == n_params
    macs = model_shape(dissect(stock), 1, 4, blocks=False).macs_per_token
    assert cost(shape, [x.whole for x in anatomy.blocks], hidden=width)["macs"] == macs
    assert torch.equal(logits(model), dense)


def stock_of(anatomy, narrow, kept=None):
    """Model of the stock class with the narrow weights, and these."""
    model = anatomy.model
    kept = kept or [block.whole for block in anatomy.blocks]
    content, weights = stock_model(CutModel(anatomy, kept, narrow=narrow))
    content.pop("architectures")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = type(model)(type(model.config)(**content)).float().eval().requires_grad_(False)
    stock.load_state_dict(weights, strict=False)
    stock.tie_weights()
    return stock, weights


@pytest.mark.parametrize("name", NO_WIDTHS)
def test_other_families_are_refused_in_one_line_with_the_reason(name):
    _, anatomy = small(name)
    said = refusal(anatomy)
    if said:
        assert said.startswith("Expected ")
        assert said.endswith(f"with {NO_WIDTHS[name]}.")
        assert "\n" not in said
    else:
        assert "the width of all heads" in NO_WIDTHS[name]
        for width in (WIDTH, 16):
            assert stock_hidden(anatomy, width, groups=True, queries=name not in WHOLE_GROUPS) == ()


@pytest.mark.parametrize("name", [x for x in HELD_WIDTHS if x not in PLAIN])
@pytest.mark.usefixtures("forked_reload")
def test_mixtures_hybrids_and_latent_attention_are_exported_narrow(name, tmp_path):
    """Beside a removed sub-layer, whose removal is its zeroing; stock transformers generate cached as uncached."""
    model, anatomy = small(name)
    width = width_of(name)
    narrow = hidden_order(anatomy, TOKENS, (width,)).at(width)
    whole = [block.whole for block in anatomy.blocks]
    stock, _ = stock_of(anatomy, narrow)
    layout = find_layouts(anatomy, experts=True)[0]
    for part in layout.parts:
        stream, live = narrowed(anatomy, narrow), live_part(part)
        live.remove()
        removed = logits(model)
        live.restore()
        stream.restore()
        outputs = outputs_of(find_layouts(dissect(stock), experts=True)[0], part.kind)
        held = [(x.weight, x.bias) for x in outputs]
        for x in outputs:
            x.point_to(torch.zeros_like(x.weight))
            set_bias(x.module, None if x.bias is None else torch.zeros_like(x.bias))
        zeroed = logits(stock)
        for x, (weight, bias) in zip(outputs, held, strict=True):
            x.point_to(weight)
            set_bias(x.module, bias)
        assert float((removed - zeroed).abs().max()) <= 1e-4 * float(zeroed.abs().max()), part.name
    check_structured(anatomy, small_tokenizer(), whole, "hf-stock", narrow)
    narrowed(anatomy, narrow)
    report = export_structured(
        anatomy,
        small_tokenizer(),
        whole,
        manifest(whole, "hf-stock"),
        tmp_path / "out",
        check_tokens=TOKENS,
        narrow=narrow,
    )
    assert report.comparison.logit_error <= 1e-4
    assert report.comparison.greedy_gap <= 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == width
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) == report.manifest.parameters["saved"]


def outputs_of(layout, kind):
    kinds = ("attention", "recurrent") if kind == "attention" else ("mlp", "experts")
    return [x for x in layout.block.linears if x.is_output and x.sublayer in kinds]


@pytest.mark.parametrize("name", FEWER_HEADS)
def test_fewer_heads_beside_fewer_channels_are_what_the_stock_class_computes(name):
    """Where the width of all heads follows the hidden width, both are cut together."""
    model, anatomy = small(name)
    assert stock_hidden(anatomy, WIDTH, groups=False, queries=False) == ()
    groups, queries = stock_hidden(anatomy, 16, groups=True, queries=True)[0]
    kept = [block.whole._replace(kv_groups=groups, queries=queries) for block in anatomy.blocks]
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=TOKENS, sequential=False)
    narrow = hidden_order(anatomy, TOKENS, (16,)).at(16)
    narrowed(anatomy, narrow)
    live = logits(model)
    stock, _ = stock_of(anatomy, narrow, kept)
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


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("falcon_h1", ["heads", "channels"]),
        ("jamba", ["groups", "experts"]),
        ("mixtral", ["groups", "experts"]),
        ("deepseek_v2", ["groups", "experts"]),
        ("nemotron_h", ["channels"]),
        ("mamba2", ["blocks"]),
    ],
)
def test_widths_of_hybrids_and_mixtures_are_searched_and_carried_at_their_cost(name, units):
    _, anatomy = small(name)
    space = settings(units=[*units, "hidden"], target=0.5, target_format="hf-stock").space
    ArchitecturePruner.check_model(space, anatomy)
    shape = model_shape(anatomy, 1, 4, held=ArchitecturePruner.held_of(space, anatomy))
    built = SPACES["architecture"].build(space, prunables(anatomy), shape)
    rng = np.random.default_rng(0)
    found = {built.sample(rng, 0) for _ in range(40)}
    narrow = [candidate for candidate in found if candidate.hidden]
    assert narrow
    for candidate in narrow[:3]:
        channels = Narrow(tuple(range(candidate.hidden)), {})
        cut = CutModel(anatomy, candidate.blocks, planned=True, narrow=channels)
        _, weights = stock_model(cut)
        saved = {own for own, _ in anatomy.model.named_parameters()} | {
            own for own in weights if "experts" in own
        }
        n_params = sum(value.numel() for own, value in weights.items() if own in saved)
        assert cost(shape, candidate.blocks, hidden=candidate.hidden)["params"] == n_params
        assert 0.45 < cost(shape, candidate.blocks, hidden=candidate.hidden)["sparsity"] < 0.55
