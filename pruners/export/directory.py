"""A directory in the form of transformers, from a config, weights and code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.models.checkpoints.quiet import quiet

# Lists in configs with a place for each block.
BLOCKWISE = ("layer_types", "no_rope_layers", "mlp_layer_types")


@dataclass(frozen=True)
class Form:
    """Content of a directory of transformers' besides the tokenizer.

    Args:
        config: the content of ``config.json``.
        weights: by name, as `stored` gives them.
        code: Python files by name; with any, loading takes `trust_remote_code`.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    code: Mapping[str, str] = field(default_factory=dict)


def write_form(form: Form, model: Any, tokenizer: PreTrainedTokenizerBase, to: Path) -> None:
    """Write the files; generation settings are the model's."""
    (to / "config.json").write_text(json.dumps(form.config, indent=2) + "\n", encoding="utf-8")
    for name, text in form.code.items():
        (to / name).write_text(text, encoding="utf-8")
    with quiet():
        save_torch_state_dict(dict(form.weights), to)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(to)
        tokenizer.save_pretrained(to)


def base_config(config: Any, stays: tuple[int, ...]) -> dict[str, Any]:
    """The dense config's content for a model of the blocks that stay, their shapes still the dense ones."""
    content: dict[str, Any] = config.to_dict()
    n_blocks = config.num_hidden_layers
    for name in BLOCKWISE:
        values = content.get(name)
        if isinstance(values, list) and len(values) == n_blocks:
            content[name] = [values[index] for index in stays]
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    content[depth] = len(stays)
    return content
