"""Loading models from directories and by name: small random ones, made here."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.models.runner import BlockRunner
from tests.checkpoints import WORDS, fails, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        model.save_pretrained(directory)
        tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- directories


def test_a_directory_is_loaded_ready_to_measure(model, saved):
    loaded = load_model(str(saved))
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer("the t").input_ids == [1, 3]
    assert loaded.name == str(saved)
    assert loaded.checkpoint.source == f"directory {saved.resolve()}"


def test_the_precision_is_float32_on_the_cpu_unless_another_is_named(saved):
    assert load_model(str(saved)).model.dtype == torch.float32
    assert load_model(str(saved), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_model_spread_over_what_devices_there_are_runs_block_by_block(model, saved):
    loaded = load_model(str(saved), device="spread")
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)
    runner = BlockRunner(dissect(loaded.model))
    inputs = runner.start(tokens)
    assert torch.equal(runner.anatomy.logits(runner.anatomy.tail(runner.run(inputs))), model(tokens).logits)


def test_the_fingerprint_follows_content_and_not_place(saved, directory):
    before = load_model(str(directory)).fingerprint
    assert before == load_model(str(saved)).fingerprint
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    after = load_model(str(directory)).fingerprint
    assert before != after
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    assert load_model(str(directory)).fingerprint not in {before, after}


def test_shards_are_found_by_their_index(model, saved, directory):
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    loaded = load_model(str(directory))
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.fingerprint != load_model(str(saved)).fingerprint
    shard = min(directory.glob("*.safetensors"))
    shard.unlink()
    fails(directory, f"{shard.name}.* which the index lists")


def test_a_directory_without_a_part_of_a_model_is_an_error(directory, tmp_path):
    fails(tmp_path, "model directory with config.json")
    (directory / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    fails(directory, "Expected a tokenizer")
    (tmp_path / "tokenizer.json").rename(directory / "tokenizer.json")
    (directory / "model.safetensors").unlink()
    fails(directory, r"Expected weights \(model.safetensors")
    (directory / "model.safetensors.index.json").write_text("[]")
    fails(directory, "Expected an index of shards")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_named(directory, keep):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    fails(directory, rf"whole safetensors file, got '.*model\.safetensors' of {weights.stat().st_size} bytes")


def test_weights_of_another_config_are_an_error(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"model_type": "olmo2", "num_hidden_layers": 3})
    )
    fails(directory, "are missing, e.g. model.layers.0.post_feedforward_layernorm.weight")
    (directory / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    fails(directory, "8 are missing, e.g. model.layers.0.self_attn.k_proj.bias")
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    fails(
        directory,
        r"down_proj.weight of shape \(32, 40\), as the config has it, got \(32, 48\) in the weights",
    )


LIES = {"num_hidden_layers": 2, "vocab_size": 8, "hidden_size": 32}


@pytest.mark.parametrize("key", LIES)
@pytest.mark.parametrize("value", [0, 3, 10**9])
def test_a_config_that_contradicts_the_stored_weights_is_refused_before_a_model_is_built(
    directory, monkeypatch, key, value
):
    monkeypatch.setattr(
        tf.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("built")
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    fails(directory, f"Expected `{key}` of '.*config.json' to be {LIES[key]}, .*, got {value}[.] Take config")


@pytest.mark.parametrize(
    "config",
    [
        tf.GPT2Config(vocab_size=8, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
        tf.OPTConfig(vocab_size=8, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=4, do_layer_norm_before=False, pad_token_id=0),
        tf.GPTNeoXConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=0, eos_token_id=0),
        tf.Gemma2Config(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0),
        tf.Phi3Config(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, pad_token_id=0, eos_token_id=0),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_sizes_of_other_families_are_read_from_their_own_names(directory, config):
    with quiet():
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    load_model(str(directory))
    written = json.loads((directory / "config.json").read_text())
    layers = "n_layer" if "n_layer" in written else "num_hidden_layers"
    for key in (layers, "vocab_size"):
        (directory / "config.json").write_text(json.dumps(written | {key: 10**9}))
        fails(directory, f"Expected `{key}` of .*, got 1000000000")


@pytest.mark.parametrize(
    "name", ["../secret/x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", None, 7]
)
def test_a_shard_that_is_no_plain_file_name_is_refused(directory, secateur, name):
    (directory.parent / "secret").mkdir()
    shutil.copy(directory / "model.safetensors", directory.parent / "secret" / "x.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": name, "lm_head.weight": name}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    inside = name in ("..", "")  # directories
    fails(
        directory,
        "which the index lists" if inside else "index of shards with a `weight_map` to files beside it",
    )
    code, _, err = secateur("evaluate", directory)
    assert code == 2
    assert len([line for line in err.splitlines() if "Expected" in line]) == 1


def test_a_config_that_transformers_cannot_read_or_does_not_know_is_an_error(directory):
    (directory / "config.json").write_text("{")
    fails(directory, "not a valid JSON file")
    (directory / "config.json").write_text(json.dumps({"model_type": "novel"}))
    fails(directory, "novel")


def test_a_damaged_tokenizer_is_an_error(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    fails(directory, "Expected a causal LM with a tokenizer")


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(directory):
    ran = directory / "ran"
    auto_map = {"AutoConfig": "novel.Novel", "AutoModelForCausalLM": "novel.NovelForCausalLM"}
    (directory / "config.json").write_text(json.dumps({"model_type": "novel", "auto_map": auto_map}))
    (directory / "novel.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    fails(directory, "Set `trust_remote_code`")
    assert not ran.exists()


# --- names, devices, precisions


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    fails("tyni", r"got 'tyni'. Did you mean 'tiny'\?")
    fails("smollm-135m", r"Did you mean 'smollm2-135m'\?")
    fails("/nowhere/at/all", "an existing directory")
    fails("nowhere.gguf", "an existing .gguf file")
    fails("models/nowhere.gguf", "an existing .gguf file")


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    fails(tmp_path / "model.bin", "a directory or a .gguf file")
    (tmp_path / "model.gguf").write_bytes(b"x")
    fails(tmp_path / "model.gguf", "does not begin with 'GGUF'")


def test_unknown_devices_and_precisions_are_errors(saved):
    fails(saved, "Expected `dtype` to be one of auto, float32", dtype="int8")
    fails(saved, "Expected `device`", device="abacus")
    fails(saved, "Expected `device`", device="cuda:99")


def test_the_embedded_model_is_there():
    directory = Path(str(resources.files("secateur.pruners") / "data" / "tiny"))
    loaded = load_model("tiny")
    assert loaded.checkpoint.source == "embedded"
    text = "A list is a mutable sequence."
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8 * 2**20


def test_loading_says_nothing_and_leaves_transformers_settings_alone(saved, capfd):
    before = (tf.logging.get_verbosity(), tf.logging.is_progress_bar_enabled())
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")
    assert (tf.logging.get_verbosity(), tf.logging.is_progress_bar_enabled()) == before
