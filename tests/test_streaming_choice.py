"""The choice between streamed and whole pruning: by room, by setting, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.pruners.models import mapped
from secateur.pruners.models.checkpoints.checkpoint import ModelError
from secateur.pruners.models.mapped import NotStreamedError, load_mapped
from secateur.search import app
from secateur.search.app.forecasting import foretold, stream_by
from secateur.search.app.stock import stock_file
from secateur.search.errors import UsageError
from secateur.search.show.forecast import refusal
from secateur.spaces.forecast import Forecast, Holding
from tests.streaming import FEW, recipe, saved


@pytest.mark.usefixtures("forked_reload")
def test_a_large_model_is_streamed_by_itself_and_a_small_one_is_not(tmp_path, monkeypatch):
    model = saved(tmp_path / "model", "llama")
    app.prune(recipe(), str(model), tmp_path / "small", **FEW)
    assert (tmp_path / "small" / "model.safetensors").is_file()
    monkeypatch.setattr(mapped, "available_bytes", lambda device: 1 << 18)
    app.prune(recipe(), str(model), tmp_path / "large", **FEW)
    assert (tmp_path / "large" / "model-00004-of-00004.safetensors").is_file()
    said: list[str] = []
    app.prune(recipe(allocation="owl"), str(model), tmp_path / "owl", **FEW, say=said.append)
    assert (tmp_path / "owl" / "model.safetensors").is_file()
    assert any(
        "loaded whole, and not streamed: Expected shares that follow from no weights" in x for x in said
    )


def forecast(n_bytes: int, stream: str = "", streamed: Forecast | None = None) -> Forecast:
    """A forecast of so many bytes of memory, of which 100 are free."""
    held = (Holding("weights", "host", n_bytes, ("load",)),)
    subject = {"parameters": 1} | ({"stream": stream} if stream else {})
    return Forecast(subject, "cpu", held, (), {"host": 100}, streamed=streamed)


def test_what_does_not_fit_as_a_whole_is_streamed():
    small, large, streamed = forecast(90), forecast(900), forecast(50, "always")
    said: list[str] = []
    found = foretold(lambda timing: replace(large, streamed=streamed), said.append)
    assert found == streamed
    assert "the model does not fit as a whole, and is streamed" in said
    assert stream_by(found, "auto") == "always"
    found = foretold(lambda timing: replace(small, streamed=streamed), said.append)
    assert found.peak("host")[0] == 90
    assert stream_by(found, "auto") == "auto"
    assert stream_by(found, "always") == stream_by(None, "always") == "always"
    with pytest.raises(UsageError, match="Expected room for 900 B in the memory, got 100 B free"):
        foretold(lambda timing: large, said.append)
    with pytest.raises(UsageError, match="Expected room for 900 B"):
        foretold(lambda timing: replace(large, streamed=forecast(500, "always")), said.append)
    with pytest.raises(UsageError, match="Expected `--stream` out of auto, always, never, got 'sometimes'"):
        stream_by(None, "sometimes")
    assert refusal(replace(large, streamed=streamed)).endswith("It would fit with `stream: always` (50 B).")


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"allocation": "owl"}, "Expected shares that follow from no weights, got the rule owl"),
        ({"metric": "gblm"}, "Expected a metric or a reconstruction of single layers, got gblm"),
        ({"metric": "sparsellm"}, "Expected a metric or a reconstruction of single layers, got sparsellm"),
        ({"repair": "bias"}, "Expected a repair that adds no biases, got bias"),
        (
            {"calibration": {"samples": 1, "length": 64, "choose": "loss"}},
            "Expected calibration windows chosen at random",
        ),
    ],
)
def test_recipes_that_need_more_than_a_block_are_refused(tmp_path, further, message):
    with pytest.raises(UsageError, match=message):
        app.prune(recipe(**further), "tiny", tmp_path / "to", **FEW, stream="always")
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_stored_one_to_one_are_refused(tmp_path):
    model = saved(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    renamed = {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"Expected weights stored one by one under the names of LlamaForCausalLM"
    ):
        app.prune(recipe(), str(model), tmp_path / "to", **FEW, stream="always")
    few = FEW | {"loading": {"dtype": "float32"}}
    mixture = saved(tmp_path / "mixture", "gpt_oss", torch.bfloat16)
    with pytest.raises(UsageError, match="Expected `--dtype` as the weights of a mixture are stored"):
        app.prune(recipe(), str(mixture), tmp_path / "to", **few, stream="always")
    with pytest.raises(UsageError, match="Expected `--stream` out of auto, always, never, got 'allways'"):
        app.prune(recipe(), "tiny", tmp_path / "to", **FEW, stream="allways")
    with pytest.raises(UsageError, match="Expected a recipe that zeros weights, such as wanda"):
        app.prune(stock_file(), "tiny", tmp_path / "to", **FEW, stream="always")
    with pytest.raises(NotStreamedError, match="without code of its own"):
        load_mapped("tiny", trust_remote_code=True)


def test_shapes_that_contradict_the_config_are_named(tmp_path):
    model = saved(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"of shape \(40, 32\), as the config has it, got \(48, 32\)"):
        load_mapped(str(model))
