"""Logits computed from nothing but a GGUF file, as by llama.cpp's `llama` and `deci`: slow, and easy to follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruners.export.export_check import Comparison, compare, logits_of

N_PROMPT, N_GENERATED = 8, 8


def check_gguf(
    path: Path, model: PreTrainedModel, tokens: Int64[Tensor, "rows length"], tolerance: float
) -> Comparison:
    """Compare a file with the model in memory: logits, and greedy tokens by the model's own logits.

    Raises:
        ExportError: if they differ.
    """
    read = GgufModel(path)
    found = torch.stack([read.logits(row) for row in tokens.cpu()])
    prompt = tokens[0, :N_PROMPT].cpu()
    name = f"GGUF file of arch {read.arch}, read back"
    return compare(name, logits_of(model, tokens), found, lambda: _generate(read, model, prompt), tolerance)


def _generate(
    read: GgufModel, model: PreTrainedModel, prompt: Int64[Tensor, " length"]
) -> tuple[list[int], float]:
    """Greedy tokens of the file, and how far the least of their logits in memory is below the best."""
    tokens = prompt
    for _ in range(N_GENERATED):
        tokens = torch.cat([tokens, read.logits(tokens)[-1:].argmax(-1)])
    generated = tokens[len(prompt) :]
    logits = logits_of(model, tokens[None, :-1])[0, len(prompt) - 1 :]
    chosen = logits.gather(-1, generated[:, None])
    gap = (logits.amax(-1, keepdim=True) - chosen).amax() / logits.abs().amax()
    return generated.tolist(), float(gap)


class GgufModel:
    """A Llama-like model in a GGUF file, as its metadata describe it; tensors are read when they are used."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self.arch: str = reader.fields["general.architecture"].contents()
        prefix = f"{self.arch}."  # the rest, the vocabulary above all, is long and not needed
        self.fields = {name: x.contents() for name, x in reader.fields.items() if name.startswith(prefix)}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.dequantize

    def _value(self, name: str) -> Any:
        return self.fields[f"{self.arch}.{name}"]

    def _of_layer(self, name: str, layer: int) -> int:
        value = self._value(name)
        found: int = value[layer] if isinstance(value, list) else value
        return found

    def _tensor(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy()).float()

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        bias = self._tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        return F.linear(hidden, self._tensor(f"{name}.weight"), bias)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        eps = self._value("attention.layer_norm_rms_epsilon")
        return F.rms_norm(hidden, hidden.shape[-1:], self._tensor(f"{name}.weight"), eps)

    @torch.no_grad()
    def logits(self, tokens: Int64[Tensor, " length"]) -> Float[Tensor, "length vocabulary"]:
        """Logits of one sequence, without a cache."""
        hidden = self._tensor("token_embd.weight")[tokens]
        for layer in range(self._value("block_count")):
            if self._of_layer("attention.head_count", layer):
                hidden = hidden + self._attention(layer, self._norm(f"blk.{layer}.attn_norm", hidden))
            hidden = hidden + self._mlp(layer, self._norm(f"blk.{layer}.ffn_norm", hidden))
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self._linear(head, self._norm("output_norm", hidden))

    def _attention(self, layer: int, hidden: Tensor) -> Tensor:
        counts = {"q": "attention.head_count", "k": "attention.head_count_kv", "v": "attention.head_count_kv"}
        q, k, v = (
            self._linear(f"blk.{layer}.attn_{name}", hidden)
            .unflatten(-1, (self._of_layer(count, layer), -1))
            .transpose(0, 1)
            for name, count in counts.items()
        )
        mixed = F.scaled_dot_product_attention(
            self._rotate(q)[None], self._rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )
        return self._linear(f"blk.{layer}.attn_output", mixed[0].transpose(0, 1).flatten(1))

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        gate = F.silu(self._linear(f"blk.{layer}.ffn_gate", hidden))
        return self._linear(f"blk.{layer}.ffn_down", gate * self._linear(f"blk.{layer}.ffn_up", hidden))

    def _rotate(self, heads: Float[Tensor, "heads length width"]) -> Float[Tensor, "heads length width"]:
        """Turn neighbours, as llama.cpp does for these architectures."""
        width, length = self._value("rope.dimension_count"), heads.shape[1]
        frequencies = self._value("rope.freq_base") ** -(torch.arange(0, width, 2) / width)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self._tensor("rope_freqs.weight")
        angles = torch.arange(length)[:, None] * frequencies
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        return turned.flatten(-2)
