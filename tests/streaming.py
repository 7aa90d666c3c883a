"""Small saved models, a recipe to prune them by, and the comparison of what was pruned in two ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.pruners.export import streamed
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.models.loading import load_model
from secateur.search.app.recipe_file import RecipeFile
from tests.mixtures import MIXTURES, make_mixture

COMMON = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 4096, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FEW = {"tokens": 128, "window": 32, "loading": {"dtype": "float32"}}


def saved(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A random model with the tokenizer of tiny."""
    if kind in MIXTURES:
        model = make_mixture(kind, dtype, vocab_size=4096)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # as they are published
                buffer.data = buffer.data.float()
    else:
        torch.manual_seed(0)
        common = GPT2 if kind == "gpt2" else COMMON
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common | changes)).to(dtype)
    model.save_pretrained(directory)
    load_model("tiny").tokenizer.save_pretrained(directory)
    return directory


def recipe(metric: object = "wanda", **further: object) -> RecipeFile:
    """Half of the weights, on two short windows."""
    plain = {"unit": "weights", "sparsity": 0.5, "metric": metric, **further}
    plain.setdefault("calibration", {"samples": 2, "length": 32, "choose": "random"})
    return RecipeFile.model_validate(
        {"recipe": plain, "sources": {"calibration": "docs"}, "pool_tokens": 2048}
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def check_equal(one: Path, other: Path, share: float = 0.5) -> None:
    """The same weights, config, measurements and counts of zeros."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    assert [x.dtype for x in before.values()] == [after[name].dtype for name in before]
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    whole, by_block = (json.loads((x / MANIFEST).read_text()) for x in (one, other))
    differs = {name for name in whole if whole[name] != by_block[name]}
    assert differs <= {"checks", "files", "size_bytes"}
    assert sum(by_block["zeros"].values()) == pytest.approx(
        share * sum(by_block["weights"].values()), rel=0.01
    )


class Stopped(BaseException):
    """Ends a prune as Ctrl-C does."""


def stop() -> None:
    raise Stopped


def saving(block: int, act: Callable[[], None]) -> Callable[..., None]:
    """`save_file` of streamed exports that acts first where it writes this block."""
    save = streamed.save_file

    def acting(tensors: dict[str, torch.Tensor], path: Path, **further: object) -> None:
        if any(name.startswith(f"model.layers.{block}.") for name in tensors):
            act()
        save(tensors, path, **further)

    return acting
