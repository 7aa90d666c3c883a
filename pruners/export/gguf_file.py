"""Structured model as a GGUF file for stock llama.cpp, checked by computing from the file.

Llama.cpp builds tensors from per-layer sizes for few architectures. `deci` is one: Llama blocks with any number of
heads and channels, and without attention. A block without MLP gets channels of zeros, as `deci` would forget
the attention's output there. Blocks of one shape are written as arch `llama`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.export.cut import CutModel, Job, Saved, stored
from secateur.pruners.export.export_check import TOLERANCES
from secateur.pruners.export.gguf_check import check_gguf
from secateur.pruners.export.gguf_vocabulary import check_tokenizer, write_vocabulary

FAMILIES = ("llama", "mistral")
FILE = "model.gguf"
N_ZERO_CHANNELS = 32  # the smallest width that quantisation in blocks of 32 takes

# By the path within a block, without `weight` or `bias`.
_NAMES = {
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
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROTATED = ("attn_q", "attn_k")
_ROPES = ("default", "linear", "llama3")  # whose frequencies are fixed


def save_gguf(job: Job, made: Path, scratch: Path) -> Saved:
    """Write ``model.gguf`` with the tokenizer in it, and compare logits computed from it with the live model's.

    Raises:
        ValueError: if llama.cpp has no place for something in the model, or the package `gguf` is missing.
        ExportError: if what was read back differs.
    """
    check_config(job.cut, job.tokenizer)
    tensors, lossy = stored(dict(_tensors(job.cut)), job.dtype)
    uniform = job.cut.alike
    arch = "llama" if uniform else "deci"
    _write(made / FILE, arch, job, scratch, tensors)
    model: Any = job.cut.anatomy.model
    tolerance = max(TOLERANCES[model.dtype], TOLERANCES[job.dtype] if lossy else 0.0)
    comparison = check_gguf(made / FILE, model, job.tokens, tolerance)
    return Saved(comparison, sum(tensor.numel() for tensor in tensors.values()))


def check_config(cut: CutModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if llama.cpp has no place for something in the model, or `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "Expected the package `gguf` to write this format; it is missing. Run pip install 'secateur[gguf]'."
        )
    if cut.anatomy.family not in FAMILIES:
        raise ValueError(
            f"Expected a family for gguf ({', '.join(FAMILIES)}), got {cut.anatomy.family!r}. Use the format hf."
        )
    rope = cut.config.rope_parameters.get("rope_type", "default")
    if rope not in _ROPES:
        raise ValueError(
            f"Expected a rotary embedding of {', '.join(_ROPES)} for gguf, got {rope!r}. Use hf."
        )
    if cut.config.hidden_act != "silu":
        raise ValueError(f"Expected the activation silu for gguf, got {cut.config.hidden_act!r}. Use hf.")
    check_tokenizer(tokenizer)


def _tensors(cut: CutModel) -> Iterator[tuple[str, Tensor]]:
    """The saved tensors by their GGUF names; norms and biases are written in float32 later."""
    weights = cut.weights()
    for name, value in weights.items():
        path, _, kind = name.rpartition(".")
        if path in _OUTER:
            yield f"{_OUTER[path]}.{kind}", value
            continue
        block, within = path.removeprefix("model.layers.").split(".", 1)
        target = _NAMES[within]
        head_dim = cut.anatomy.blocks[0].head_dim
        yield f"blk.{block}.{target}.{kind}", _turned(value, head_dim) if target in _ROTATED else value
    for place, index in enumerate(cut.kept_blocks):
        if not cut.kept[index].ffn:
            yield from _zero_mlp(place, cut.width, next(iter(weights.values())))
    factors = _frequency_factors(cut)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _turned(weight: Float[Tensor, "rows *columns"], head_dim: int) -> Float[Tensor, "rows *columns"]:
    """Rows in the order of llama.cpp's rotary embedding: it turns neighbours, transformers halves of a head."""
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


def _zero_mlp(place: int, width: int, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"blk.{place}.ffn_norm.weight", like.new_ones(width)
    for name in ("ffn_gate", "ffn_up"):
        yield f"blk.{place}.{name}.weight", like.new_zeros(N_ZERO_CHANNELS, width)
    yield f"blk.{place}.ffn_down.weight", like.new_zeros(width, N_ZERO_CHANNELS)


def _frequency_factors(cut: CutModel) -> Float[Tensor, " pairs"] | None:
    """Quotients of plain rotary frequencies and the live model's; None if they are equal."""
    buffers = dict(cut.anatomy.model.named_buffers())
    frequencies = next(x for name, x in buffers.items() if name.endswith(".inv_freq")).double().cpu()
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors = cut.config.rope_parameters["rope_theta"] ** -exponents / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _write(path: Path, arch: str, job: Job, scratch: Path, tensors: dict[str, Tensor]) -> None:
    import gguf

    cut, config = job.cut, job.cut.config
    head_dim = cut.anatomy.blocks[0].head_dim
    windows = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(job.parent)
    writer.add_context_length(min(window for window in windows if window))
    writer.add_embedding_length(cut.width)
    writer.add_block_count(len(cut.kept_blocks))
    _add_shapes(writer, cut, arch)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(cut.anatomy.vocab_size)
    write_vocabulary(writer, job.tokenizer, cut.anatomy.vocab_size, scratch / "tokenizer")
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for name, tensor in tensors.items():
        kind = kinds[torch.float32 if tensor.ndim == 1 else job.dtype]
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shapes(writer: Any, cut: CutModel, arch: str) -> None:
    """Heads and widths: one number each for `llama`, a list with a place for each block for `deci`."""
    shapes = [cut.shape(index) for index in cut.kept_blocks]
    heads = [shape["num_attention_heads"] for shape in shapes]
    kv_heads = [shape["num_key_value_heads"] for shape in shapes]
    widths = [shape["intermediate_size"] or N_ZERO_CHANNELS for shape in shapes]
    adders = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, numbers in zip(adders, (heads, kv_heads, widths), strict=True):
        add(numbers[0] if arch == "llama" else numbers)
