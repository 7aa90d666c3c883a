"""The blended metric against the metrics that are its points, and against a slow reference."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.recipes.blend import Blend, unit_scores
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.weights.wanda import wanda
from secateur.spaces.methods import IMPORTANCES
from tests.structures import CONFIGS, TOKENS, build

FAMILIES = ("qwen2", "phi3", "gpt2", "gpt_neox")
POINTS = {
    "llm_pruner_first": (Blend(order="first", magnitude=0.0), 1.0),
    "llm_pruner_vector": (Blend(order="first", magnitude=0.0, absolute="vector"), 1.0),
    "llm_pruner_second": (Blend(order="second", magnitude=0.0), 0.5),
    "llm_pruner_mixed": (Blend(order="mixed", angle=0.5, magnitude=0.0), math.sqrt(0.5)),
    "llm_pruner_l1": (Blend(), 1.0),
    "llm_pruner_l2": (Blend(magnitude=2.0), 1.0),
    "wanda_sp": (Blend(activation=1.0, reduce="output"), None),  # a mean
    "magnitude": (Blend(norm=2, reduce="output"), 1.0),
}


@pytest.fixture(scope="module")
def evidence():
    """Of the second block's sub-layers, by family."""
    found = {}
    for name in FAMILIES:
        config = deepcopy(CONFIGS[name])
        if name == "qwen2":
            config.num_attention_heads, config.num_key_value_heads = 8, 4
        anatomy = dissect(build(config))
        gradients = collect_gradients(anatomy, TOKENS, ("mean", "rms"))
        *_, last = stream_blocks(anatomy, TOKENS, outputs="moments")
        found[name] = [
            Evidence(part, last.outputs[part.output.name], gradients, 0.01)
            for part in find_layouts(anatomy)[1].sublayers
        ]
    return found


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_published_metrics_are_points(evidence, family, name):
    blend, factor = POINTS[name]
    for given in evidence[family]:
        found, wanted = unit_scores(given, blend), IMPORTANCES[name].function(given).double()
        if name == "llm_pruner_mixed":  # alpha = beta: both terms by the same number
            assert factor == pytest.approx(math.cos(math.pi / 4))
        ratio = found / wanted
        expected = ratio.mean() if factor is None else torch.tensor(factor, dtype=torch.float64)
        assert torch.allclose(ratio, expected.expand_as(ratio), rtol=1e-4)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "output"])
@pytest.mark.parametrize("absolute", ["element", "vector"])
@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_units_by_hand(evidence, absolute, norm, reduce):
    weights = {"q": 0.5, "k": 0.0, "v": 1.0, "o": 0.25, "gate": 0.1, "down": 0.7}
    blend = Blend("mixed", 0.3, 0.5, 1.5, absolute, norm, reduce, weights)
    for given in evidence["qwen2"]:
        layout, sizes, scales = given.layout, [], []
        for placement in layout.placements:
            linear = placement.linear
            w = linear.weight.double()
            g, f = (given.gradients[kind][linear.name].double() for kind in ("mean", "rms"))
            e = math.cos(0.15 * math.pi) * w * g - math.sin(0.15 * math.pi) * (w * f) ** 2 / 2
            e = e * w.abs() ** 0.5
            if linear is layout.output:
                e = (e * given.seen.norm.double() ** 1.5).T
            units = e.reshape(layout.n_units, -1, e.shape[1])
            values = units.abs().flatten(1) if absolute == "element" else units.sum(2).abs()
            size = {1: values.sum(1), 2: values.square().sum(1).sqrt(), "inf": values.amax(1)}[norm]
            sizes.append(size)
            scales.append(weights.get(linear.role, 1.0))
        scaled = torch.stack([c * size for c, size in zip(scales, sizes, strict=True)])
        powers = torch.stack([size**c for c, size in zip(scales, sizes, strict=True)])
        wanted = {
            "sum": scaled.sum(0),
            "mean": scaled.sum(0) / sum(scales),
            "max": scaled.amax(0),
            "prod": powers.prod(0),
            "output": sizes[-1],
        }[reduce]
        assert torch.allclose(unit_scores(given, blend), wanted, rtol=1e-4)


def separated(given):
    """The weights of q, k, v (gate, up) of a sub-layer, rows of units, from what a family's fused projection is."""
    layout, fused = given.layout, given.layout.placements[0].linear
    w = fused.weight.double()
    if fused.role == "gate_up":
        return dict(zip(("gate", "up"), w.chunk(2), strict=True))
    heads, head = layout.heads_per_group * layout.n_units, layout.head_dim
    if len(layout.placements[0].parts) == 1:  # GPT-NeoX: q, k, v of each head
        q, k, v = w.reshape(heads, 3, head, -1).unbind(1)
    else:
        q, k, v = w.split([heads * head, layout.n_units * head, layout.n_units * head])
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize(("family", "sublayer"), [("phi3", 0), ("phi3", 1), ("gpt2", 0), ("gpt_neox", 0)])
def test_fused_matrices_are_taken_apart(evidence, family, sublayer):
    given = evidence[family][sublayer]
    for name, matrix in separated(given).items():
        alone = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.0) | {name: 1.0}
        wanted = matrix.abs().reshape(given.layout.n_units, -1).sum(1)
        assert torch.allclose(unit_scores(given, Blend(weights=alone)), wanted, rtol=1e-5), name


def test_weights_by_hand_and_wanda(evidence):
    given = evidence["gpt2"][1]
    linear, gradients = given.layout.output, given.gradients
    inputs = InputStatistics.empty(linear.in_features, gram=False, device=linear.weight.device)
    inputs.add(torch.randn(50, linear.in_features, generator=torch.Generator().manual_seed(0)))
    found = Blend(activation=1.0).scores(linear, inputs)
    assert torch.equal(found, wanda(linear.weight, inputs, torch.Generator()))
    w, g = linear.weight.double(), gradients["mean"][linear.name].double()
    f = gradients["rms"][linear.name].double().square()
    wanted = (math.cos(0.1 * math.pi) * w * g - math.sin(0.1 * math.pi) * w**2 * f / 2).abs()
    wanted = wanted * w.abs() ** 1.5 * inputs.norm.double() ** 0.5
    found = Blend("mixed", 0.2, 1.5, 0.5).scores(linear, inputs, ModelStatistics(2, gradients)).double()
    assert torch.allclose(found, wanted, rtol=1e-4)
    assert torch.equal(Blend().scores(linear, None), w.abs().float())


def test_a_blend_is_read_from_a_recipe():
    plain = {"name": "blend", "order": "first", "magnitude": 1, "norm": "inf", "weights": {"q": 0}}
    assert Blend.of(plain) == Blend("first", magnitude=1.0, norm="inf", weights={"q": 0.0})
    assert Blend.of({"name": "blend"}) == Blend()


def test_a_blend_says_what_it_needs():
    kinds = {order: Blend(order=order).gradients for order in ("none", "first", "second", "mixed")}
    assert kinds == {"none": (), "first": ("mean",), "second": ("rms",), "mixed": ("rms", "mean")}
    assert (Blend().needs, Blend(activation=0.1).needs) == ("nothing", "moments")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"angle": 1.1}, r"`metric.angle` in \[0, 1\], got 1.1"),
        ({"magnitude": math.nan}, r"`metric.magnitude` in \[0, 2\], got nan"),
        ({"activation": -0.5}, r"`metric.activation` in \[0, 2\], got -0.5"),
        ({"weights": {"x": 1.0}}, "`metric.weights` of q, k, v, o, gate, up, down, got one of 'x'"),
        ({"weights": {"q": 2.0}}, r"`metric.weights.q` in \[0, 1\], got 2.0"),
        ({"magnitude": 0.0}, "`metric.magnitude` or `metric.activation` > 0 where `metric.order` is none"),
    ],
)
def test_wrong_blends_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Blend(**changes)


def test_a_sublayer_without_any_weight_is_named(evidence):
    blend = Blend(weights={"up": 0.0, "down": 0.0})
    assert unit_scores(evidence["qwen2"][1], blend).any()  # gate is left
    with pytest.raises(ValueError, match=r"of up, down > 0, got 0 for all at the mlp of transformer.h.1"):
        unit_scores(evidence["gpt2"][1], blend)
