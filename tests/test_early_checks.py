"""What a config alone tells is refused before weights are loaded; ranges of texts are named where they are measured."""

from __future__ import annotations

import json

import pytest
import transformers as tf
from transformers import AutoModelForCausalLM

from secateur.pruners.models.loading import find_checkpoint, load_model
from secateur.search import app
from secateur.search.app.recipe_file import known_recipe
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from tests.checkpoints import fails
from tests.cut_models import small_tokenizer
from tests.families import make


@pytest.fixture
def no_weights(monkeypatch):
    """Nobody loads weights."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def saved(model, directory, **changes):
    """A directory with a model, whose config has these values too."""
    model.save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return str(directory)


def open_with(model, **space):
    return app.open_session(settings_from({"model": model, "space": {"kind": "architecture", **space}}))


@pytest.mark.usefixtures("no_weights")
def test_formats_that_cannot_carry_the_family_are_refused_by_the_config(tmp_path):
    model = saved(make("gemma2"), tmp_path / "gemma2")
    with pytest.raises(UsageError, match=r"gguf can carry \(llama, mistral\), got 'gemma2'"):
        open_with(model, target_format="gguf")
    with pytest.raises(UsageError, match=r"gguf can carry \(llama, mistral\), got 'gemma2'"):
        app.prune(known_recipe("flap", 0.3), model, tmp_path / "out", form="gguf")
    with_images = saved(make("gemma3 with images"), tmp_path / "gemma3")
    with pytest.raises(UsageError, match=r"Expected a model of text alone .* got gemma3"):
        open_with(with_images)


@pytest.mark.usefixtures("no_weights")
def test_models_of_other_kinds_are_refused_by_the_config(tmp_path):
    config = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    t5 = saved(tf.T5ForConditionalGeneration(config), tmp_path / "t5")
    fails(t5, "Expected a decoder-only model, got the encoder-decoder t5")
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    gptq = saved(make("llama"), tmp_path / "gptq", **quantised)
    fails(gptq, r"a checkpoint quantised by gptq .* dequantise it first")


@pytest.mark.usefixtures("no_weights")
def test_protected_projections_that_a_metric_cuts_are_refused_by_the_file(tmp_path, secateur):
    recipe = {"unit": "structure", "sparsity": 0.3, "metric": "pat", "allocation": "global"}
    file = tmp_path / "recipe.yaml"
    sources = {"calibration": "docs"}
    file.write_text(json.dumps({"recipe": recipe, "sources": sources, "protect": ["*.o_proj"]}))
    code, _, err = secateur("prune", "nowhere", "--recipe", file, "--to", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "Expected no `protect` with the metric pat, which cuts through all layers, got *.o_proj." in err


def test_a_check_of_the_config_comes_before_the_weights(monkeypatch):
    seen = []

    def load(*args, **kwargs):
        seen.append("weights")
        return original(*args, **kwargs)

    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_model("tiny", check=lambda config: seen.append(config.model_type))
    assert seen == ["llama", "weights"]


@pytest.mark.usefixtures("forked_reload")
def test_prune_and_evaluate_name_the_range_that_they_measure(tmp_path, secateur):
    """The range that `prune` names gives `evaluate` the same tokens."""
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"line {i} of the file, {i * i}\n" for i in range(3000)))
    few = ("--tokens", "512", "--window", "64")
    recipe = known_recipe("wanda", 0.5)
    plain = dict(recipe.recipe) | {
        "calibration": {**recipe.recipe["calibration"], "samples": 2, "length": 32}
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json") | {"recipe": plain, "pool_tokens": 2048}))
    prune = ("prune", "tiny", "--recipe", file, "--to", tmp_path / "model", "--text", text, *few)
    status, out, err = secateur(*prune, "--json")
    assert status == 0, err
    summary = json.loads(out)
    assert summary["text"] == f"{text}[{0.4 / 0.7!r}:1.0]"
    status, out, err = secateur("evaluate", tmp_path / "model", "--text", summary["text"], *few, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["range"] == summary["text"]
    assert found["ce"] == pytest.approx(summary["measured"]["test:512, as exported"]["ce"], rel=1e-4)
    whole = json.loads(secateur("evaluate", tmp_path / "model", "--text", text, *few, "--json")[1])
    assert whole["range"] == f"{text}[0.0:1.0]"
    assert whole["sha256"] != found["sha256"]
    assert f"measured on {text}[" in secateur(*prune)[1].replace("\n", "")
    docs = json.loads(secateur("evaluate", "tiny", *few, "--json")[1])
    assert docs["range"] == "docs, the topics of test"
    assert find_checkpoint("tiny").source == "embedded"
