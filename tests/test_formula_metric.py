from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.pruners.calibration.gradients import gradients_path, model_statistics
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.pruners.formulas.terminals import needs, terminals_of
from secateur.pruners.models.discover import dissect
from secateur.pruners.stores.block_files import is_built, load_tensors
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import method_of, prune
from secateur.search import app
from secateur.search.cli import main
from secateur.search.errors import UsageError
from secateur.search.settings.settings import load_settings, settings_from
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.operators import TERMINALS
from secateur.spaces.formulas.tree import Apply, Terminal
from tests.models import count_zeros, random_tokens, rms_gradients, small_anatomy

LEVELS = (0.0, 0.25, 0.5, 0.75)
TOKENS = random_tokens(4, 16)


def by_formula(text: str, **changes) -> Method:
    return Method(f"formula: {text}", formula=parse(text), **changes)


def pruned(method: Method, *, sequential: bool, sparsity: float = 0.55) -> list[Tensor]:
    anatomy = small_anatomy()
    asked = dict.fromkeys((x.name for x in anatomy.linears), sparsity)
    prune(anatomy, asked, method, TOKENS, sequential=sequential)
    return [x.weight for x in anatomy.linears]


# --- a formula is the metric that it spells out ---


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("wanda", {}), ("ria", {}), ("magnitude", {"comparison": "layer"}), ("wanda", {"group_size": 4})],
)
def test_known_formulas_prune_the_same_weights_as_their_metrics(name, changes, sequential):
    metric = pruned(Method(name, **changes), sequential=sequential)
    formula = pruned(by_formula(KNOWN[name].text, **changes), sequential=sequential)
    assert all(torch.equal(a, b) for a, b in zip(metric, formula, strict=True))


def test_formulas_are_compared_per_output_unless_told_otherwise():
    rows = [
        (x == 0).sum(1).unique().numel() for x in pruned(by_formula("abs(W)"), sequential=False, sparsity=0.5)
    ]
    assert set(rows) == {1}


@pytest.mark.parametrize("text", [row.text for row in KNOWN.values()] + ["abs(W) * rank(X) * exp(P) + C / R"])
def test_every_formula_prunes_a_model_exactly(text):
    anatomy = small_anatomy()
    asked = {x.name: (0.0, 0.3, 0.5, 1.0)[i % 4] for i, x in enumerate(anatomy.linears)}
    prune(anatomy, asked, by_formula(text), TOKENS, sequential=True)
    sizes = {x.name: x.n_weights for x in anatomy.linears}
    assert count_zeros(anatomy) == {x: int(asked[x] * sizes[x] + 0.5) for x in sizes}


def test_obs_is_the_cost_of_removing_a_weight():
    """w^2 / diag(H^-1) is twice the least increase of the squared output error that removing it can cost."""
    linear = next(small_anatomy().linears)
    rows = torch.randn(200, linear.in_features, generator=torch.Generator().manual_seed(0))
    inputs = InputStatistics.empty(linear.in_features, gram=True, device=rows.device)
    inputs.add(rows)
    found = scores(
        parse(KNOWN["obs"].text),
        terminals_of(linear, "WH", inputs, None, dampening=1e-7),
        tuple(linear.weight.shape),
    )
    moment, weight = (rows.T @ rows / 200).double(), linear.weight.double()
    for row, column in ((0, 0), (3, 5)):
        kept = [j for j in range(linear.in_features) if j != column]
        change = torch.linalg.solve(moment[kept][:, kept], moment[kept, column] * weight[row, column])
        delta = torch.zeros(linear.in_features, dtype=torch.float64)
        delta[kept], delta[column] = change, -weight[row, column]
        assert float(found[row, column]) == pytest.approx(float(delta @ moment @ delta), rel=1e-3)


# --- what it needs ---


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("abs(W) / R + C", ("nothing", ())),
        ("abs(W) + P", ("nothing", ())),
        ("abs(W) * X", ("moments", ())),
        ("W * W / H + X", ("gram", ())),
        ("G * abs(W)", ("nothing", ("rms",))),
        ("G * X / H", ("gram", ("rms",))),
    ],
)
def test_needs(text, needed):
    assert needs(parse(text)) == needed


W = Terminal("W")


@pytest.mark.parametrize(
    "bad", [Terminal("Y"), Apply("abs", (W, W)), Apply("add", (W,)), Apply("eval", (W,)), Apply("W", (W,))]
)
def test_what_is_no_formula_is_refused(bad):
    for tree in (bad, Apply("neg", (bad,))):
        with pytest.raises(ValueError, match="Expected a formula of W, G, X"):
            Method("formula", formula=tree)


def test_a_statistic_that_was_not_collected_is_named():
    linear = next(small_anatomy().linears)
    moments = InputStatistics.empty(linear.in_features, gram=False, device=torch.device("cpu"))
    for name, inputs, whole in (("X", None, None), ("H", moments, None), ("G", None, ModelStatistics(2, {}))):
        with pytest.raises(
            ValueError, match=f"Expected the {TERMINALS[name].source} pass to provide the terminal {name}"
        ):
            terminals_of(linear, [name], inputs, whole)


def test_position_runs_from_0_to_1():
    anatomy = small_anatomy(n_layers=3)
    found = [float(terminals_of(x, "P", None, ModelStatistics(3, {}))["P"]) for x in anatomy.linears]
    assert sorted(set(found)) == [0.0, 0.5, 1.0]


# --- gradients ---


def slow_gradients(model, tokens: Tensor) -> dict[str, Tensor]:
    """The root mean square over windows, with all gradients of all windows kept."""
    model.requires_grad_(True)
    by_window = []
    for window in tokens:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0].float()
        F.cross_entropy(logits[:-1], window[1:]).backward()
        by_window.append({name: x.grad.clone() for name, x in model.named_parameters()})
    return {name: torch.stack([x[name] for x in by_window]).square().mean(0).sqrt() for name in by_window[0]}


def test_gradients_equal_a_slow_reference_and_leave_the_model_alone():
    anatomy, reference = small_anatomy(), small_anatomy()
    before = [x.clone() for x in anatomy.model.parameters()]
    seen = []
    with torch.no_grad():  # as in a level store
        found = rms_gradients(anatomy, TOKENS, on_window=seen.append)
    expected = slow_gradients(reference.model, TOKENS)
    assert seen == [0, 1, 2, 3]
    for linear in anatomy.linears:
        assert torch.allclose(found[linear.name], expected[f"{linear.name}.weight"], rtol=1e-4, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(before, anatomy.model.parameters(), strict=True))
    assert not any(x.requires_grad or x.grad is not None for x in anatomy.model.parameters())
    again = rms_gradients(anatomy, TOKENS)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_gradients_are_computed_in_fp32_whatever_the_dtype():
    half, whole = small_anatomy(), small_anatomy()
    half.model.bfloat16()
    stored = [x.data_ptr() for x in half.model.parameters()]
    whole.model.bfloat16().float()
    found, expected = rms_gradients(half, TOKENS), rms_gradients(whole, TOKENS)
    assert all(found[name].dtype == torch.float32 for name in found)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-8) for name in found)
    assert stored == [x.data_ptr() for x in half.model.parameters()]


def test_gradients_of_transposed_weights_are_out_in():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=97, n_inner=24)
    anatomy = dissect(GPT2LMHeadModel(config).eval().requires_grad_(False))
    found = rms_gradients(anatomy, TOKENS)
    assert all(found[x.name].shape == x.weight.shape for x in anatomy.linears)


def test_gradients_under_sequential_pruning_are_the_dense_model_s():
    """Scores of G alone do not see the blocks that are pruned already."""
    once, again = (pruned(by_formula("G"), sequential=sequential) for sequential in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# --- level stores ---


def key(method: Method, tokens: str = "tokens") -> StoreKey:
    return StoreKey("model", "float32", tokens, method, LEVELS)


@pytest.mark.parametrize("text", ["abs(W * W) * minmax(G)", "square(W) / H * exp(P)"])
def test_a_level_store_holds_what_dense_calibration_prunes(tmp_path, text):
    anatomy, method = small_anatomy(), by_formula(text)
    build_levels(tmp_path / "levels", anatomy, TOKENS, key(method))
    store = LevelStore(tmp_path / "levels", anatomy, LEVELS)
    for level in (1, 2, 3):
        for linear, weight in zip(
            anatomy.linears, pruned(method, sequential=False, sparsity=LEVELS[level]), strict=True
        ):
            assert torch.equal(store.weight(linear, level), weight)


def test_gradients_are_kept_beside_the_store_for_other_formulas(tmp_path, monkeypatch):
    levels = tmp_path / "levels"
    build_levels(levels, small_anatomy(), TOKENS, key(by_formula("abs(W) * G")))
    assert load_tensors(gradients_path(levels), "model tokens")
    assert load_tensors(gradients_path(levels), "model others") is None
    assert load_tensors(tmp_path / "none", "model tokens") is None
    monkeypatch.setattr(
        "secateur.pruners.calibration.gradients.collect_gradients", None
    )  # would be called otherwise
    build_levels(levels, small_anatomy(), TOKENS, key(by_formula("abs(W) * G * X")))
    gradients_path(levels).write_bytes(b"broken")
    with pytest.raises(TypeError):
        build_levels(levels, small_anatomy(), TOKENS, key(by_formula("abs(W) / G")))


def test_stores_of_named_metrics_keep_their_identity():
    assert "program" not in key(Method("wanda")).record["method"]
    assert json.loads(json.dumps(key(by_formula("abs(W) * X")).record))["method"]["program"] == [
        "mul",
        ["abs", "W"],
        "X",
    ]
    assert key(by_formula("abs(W)")).digest != key(by_formula("abs(G)")).digest


def test_an_infeasible_formula_says_where(tmp_path):
    with pytest.raises(FormulaError, match=r"got log\(-0.* = nan at model\.layers\.0\.self_attn\.q_proj"):
        build_levels(tmp_path / "levels", small_anatomy(), TOKENS, key(by_formula("log(W)")))
    assert not is_built(tmp_path / "levels", key(by_formula("log(W)")))
    assert model_statistics(small_anatomy(), TOKENS, gradients=()).gradients == {}


# --- settings and the command line ---


def test_settings_keep_the_canonical_text():
    for metric in ("formula:  abs( W )*X", {"formula": "abs(W)*X"}):
        assert settings_from({"space": {"metric": metric}}).space.metric == "formula: abs(W) * X"
    assert load_settings(None, ["space.metric=formula: abs(W)*X"]).space.metric == "formula: abs(W) * X"
    assert formula_of("formula: abs(W) * X") == parse("abs(W) * X")


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("formula: abs(V) * X", r"`space.metric`: .*got 'V' at column 5 of 'abs\(V\) \* X'"),
        ("formula:", "got the end at column 1"),
        ("formula: W.__class__", r"got '\.' at column 2"),
        ({"formula": "mnmax(W)"}, "Did you mean 'minmax'"),
    ],
)
def test_settings_refuse_a_wrong_formula_at_once(metric, said):
    with pytest.raises(UsageError, match=said):
        settings_from({"space": {"metric": metric}})


def test_the_command_line_lists_formulas_and_refuses_wrong_ones(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, status, said in (
        (["list", "metrics"], 0, "formula: ...  such as abs(W) * X; of W G X H R C P"),
        (["search", "-o", "space.metric=formula: abs(W) * (X"], 2, "at column 12"),
    ):
        monkeypatch.setattr("sys.argv", ["secateur", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == status
        printed = capsys.readouterr()
        assert said in " ".join((printed.out + printed.err).split()).replace(
            "formula: ... ", "formula: ...  "
        )
    assert not list(tmp_path.iterdir())


# --- the whole way ---


def test_a_formula_in_the_settings_is_a_method_whose_record_is_plain(tmp_path):
    settings = settings_from({"space": {"metric": "formula: abs(W*W) * minmax(G)", "comparison": "layer"}})
    method = method_of(settings.space, seed=0)
    assert method == by_formula("abs(W * W) * minmax(G)", comparison="layer")
    assert (
        json.loads(json.dumps(method.record)).items()
        >= {
            "name": "formula: abs(W * W) * minmax(G)",
            "program": ["mul", ["abs", ["mul", "W", "W"]], ["minmax", "G"]],
            "comparison": "layer",
        }.items()
    )


def test_a_search_with_a_formula_that_is_undefined_on_the_model_is_wrong_use(tmp_path):
    settings = {
        "space": {"metric": "formula: sqrt(W)", "granularity": "block", "target": 0.5},
        "controller": {"kind": "uniform"},
        "evaluator": {"window": 64, "calibration_tokens": 64, "fidelities": [64], "test_tokens": 64},
    }
    with pytest.raises(UsageError, match=r"got sqrt\(-.* = nan at .*\. Choose another `space.metric`"):
        app.run(tmp_path / "run", **settings)
