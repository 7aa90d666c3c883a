"""Searches, evaluations and teachers of streamed models: the numbers of whole ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

from secateur.evaluators.recovery import RecoveryJob, open_pruned
from secateur.evaluators.training.settings import Training
from secateur.pruners.models.mapped import load_mapped
from secateur.search import app
from secateur.search.app.forecast_prune import forecast_prune
from secateur.search.app.forecast_search import forecast_search
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.search.show.forecast import full_lines
from tests.streaming import recipe, saved

EVALUATOR = {"window": 32, "calibration_tokens": 128, "fidelities": [64, 128], "test_tokens": 64}
SPACES = {
    "ranks": {"kind": "allocation", "metric": "wanda", "target": 0.5},
    "weights": {"kind": "allocation", "metric": "sparsegpt", "target": 0.5},
    "no statistics": {"kind": "allocation", "metric": "magnitude", "target": 0.5},
    "behind pruned blocks": {
        "kind": "allocation",
        "metric": "wanda",
        "statistics": "expected",
        "target": 0.5,
    },
    "structure": {"kind": "architecture", "target": 0.3},
}
GEMMA2 = {"sliding_window": 8, "query_pre_attn_scalar": 8}


def settings(model: object, stream: str, space: dict[str, object], **further: object):
    plain = {"evaluator": EVALUATOR, "controller": {"kind": "random"}, "budget": {"evaluations": 6}}
    return settings_from(plain | {"model": str(model), "stream": stream, "space": space} | further)


def measured(directory):
    return [(x.measurement.candidate, dict(x.measurement.values)) for x in app.open_run(directory).trials()]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma2", GEMMA2), ("gpt2", {})])
def test_a_streamed_search_measures_what_a_whole_one_does(tmp_path, kind, changes, space):
    model = saved(tmp_path / "model", kind, torch.bfloat16, **changes)
    for stream in ("never", "always"):
        app.search(settings(model, stream, SPACES[space]), tmp_path / stream)
    assert measured(tmp_path / "never") == measured(tmp_path / "always")
    assert len(measured(tmp_path / "always")) == 6
    whole, streamed = (app.open_run(tmp_path / x) for x in ("never", "always"))
    [name] = [x for x in whole.baselines if x == "dense"]
    assert whole.baselines[name].measurement.values == streamed.baselines[name].measurement.values


def test_weights_of_a_streamed_search_are_not_held(tmp_path):
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    session = app.open_session(settings(model, "always", SPACES["weights"]))
    stored = {p.data_ptr() for p in session.loaded.names.values()}
    session.build_levels(tmp_path / "levels")
    session.evaluator(tmp_path / "levels").evaluate(
        [session.space.baselines()["dense"].text], session.plan.fidelities[0]
    )
    assert session.dense.dtype == "float32"
    assert {linear.weight.dtype for linear in session.anatomy.linears} == {torch.bfloat16}
    assert all(linear.weight.data_ptr() in stored for linear in session.anatomy.linears)


@pytest.mark.parametrize(
    ("further", "what"),
    [
        ({"space": {"kind": "allocation", "metric": "gblm", "target": 0.5}}, "the space allocation"),
        ({"space": {"kind": "formula"}}, "the space formula"),
        (
            {"controller": {"kind": "evolution", "start": "trust_region"}},
            "a controller that begins with gradients",
        ),
    ],
)
def test_what_needs_all_weights_at_a_time_is_refused_or_loaded_whole(tmp_path, further, what):
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    of = settings(model, "always", **({"space": SPACES["ranks"]} | further))
    with pytest.raises(UsageError, match=f"block by block, got {what}.*Set `stream` to never") as found:
        app.open_session(of)
    assert "\n" not in str(found.value)
    stored = of.model_copy(update={"dtype": "bfloat16"})
    assert app.open_session(stored).loaded.names  # weights that are not converted serve everything


def test_a_run_is_continued_under_another_word(tmp_path):
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    app.search(settings(model, "always", SPACES["ranks"]), tmp_path / "run")
    more = settings(model, "never", SPACES["ranks"], budget={"evaluations": 9})
    app.search(more, tmp_path / "run")
    app.search(settings(model, "never", SPACES["ranks"], budget={"evaluations": 9}), tmp_path / "other")
    assert measured(tmp_path / "run") == measured(tmp_path / "other")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_model_has_the_perplexity_of_the_whole(tmp_path, kind, dtype):
    model = saved(tmp_path / "model", kind, torch.bfloat16)
    found = [
        app.evaluate(str(model), n_tokens=128, window=32, stream=stream, dtype=dtype)
        for stream in ("never", "always")
    ]
    assert found[0] == found[1]


def test_a_teacher_that_is_streamed_is_mapped_and_the_dense_model(tmp_path):
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    session = app.open_session(settings(model, "never", SPACES["ranks"]))
    text = next(x.text for name, x in session.space.baselines().items() if name != "dense")
    training = Training(method="norms", loss="kl", tokens=64, batch=1)
    logits = {}
    for word in ("never", "always"):
        job = RecoveryJob(session.plan, text, False, training, teacher=word)
        _, dense = open_pruned(job, lambda line: None)
        weight = next(dense.linears).weight
        assert weight.dtype == (torch.bfloat16 if word == "always" else torch.float32)
        with torch.no_grad():
            logits[word] = dense.model(input_ids=torch.arange(32)[None]).logits
    assert torch.equal(logits["never"], logits["always"])


def test_forecasts_know_streaming(tmp_path):
    model = saved(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=12, hidden_size=128)
    for made in (
        lambda stream: forecast_search(settings(model, stream, SPACES["ranks"]), tmp_path, timing=False),
        lambda stream: forecast_prune(
            recipe(),
            str(model),
            tokens=128,
            window=32,
            stream=stream,
            loading={"dtype": "float32"},
            timing=False,
        ),
    ):
        whole, alone, never = made("auto"), made("always"), made("never")
        assert never.streamed is None
        assert never.peak("host", needed=True)[0] == pytest.approx(
            whole.peak("host", needed=True)[0], rel=0.02
        )
        assert alone.subject["stream"] == "always"
        weights = sum(x.numel() for x in load_mapped(str(model)).model.parameters()) * 4
        held = {x.name: x for x in alone.holdings}
        assert held["weights"].mapped
        assert held["weights"].n_bytes == weights // 2
        inside = 2 * 4 * (2 * 128 * 32 + 2 * 128 * 16 + 3 * 128 * 48 + 2 * 128)
        assert held["blocks"].n_bytes == inside
        assert whole.streamed.peak("host", needed=True)[0] < whole.peak("host", needed=True)[0]
        assert any(line.startswith("with `stream: always`: memory ") for line in full_lines(whole))
        assert whole.to_json()["streamed"]["host"] == whole.streamed.peak("host")[0]


@pytest.mark.parametrize(
    ("kind", "dtype", "space"),
    [
        ("gpt_oss", "bfloat16", "ranks"),
        ("mixtral", "float32", "weights"),
        ("qwen3_moe", "float32", "structure"),
        ("olmoe", "bfloat16", "structure"),
    ],
)
def test_a_mixture_is_searched_streamed(tmp_path, kind, dtype, space):
    model = saved(tmp_path / "model", kind, torch.bfloat16)
    for stream in ("never", "always"):
        app.search(settings(model, stream, SPACES[space], dtype=dtype), tmp_path / stream)
    assert measured(tmp_path / "never") == measured(tmp_path / "always")
