"""Config and code for blocks of different shapes: `per_layer_config`, and one file around the stock class.

Transformers' config has the schema (https://github.com/huggingface/transformers/pull/45333); its models do not
build from it, and a stock `model_type` would load such a config without an error, with random layers. So the
directory has a `model_type` of its own and the class that builds it.
"""

from __future__ import annotations

import json
from importlib import resources
from string import Template
from typing import Any

from torch import Tensor

from secateur.pruners.export.cut import CutModel, sublayer_path
from secateur.pruners.models.anatomy import Sublayer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
"""Values of `model_type` that it is tested with: their attention takes its heads and `head_dim` from the config."""


def heterogeneous_model(
    cut: CutModel, parent: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Content of the config, weights, and code files by name.

    Args:
        parent: the dense model's name, for the file's first line.
    """
    stock, stock_config = type(cut.anatomy.model).__name__, type(cut.config).__name__
    module = f"modeling_secateur_{cut.anatomy.family}"
    config, model = f"Secateur{stock_config}", f"Secateur{stock}"
    content = cut.base_config() | {
        "model_type": f"secateur_{cut.anatomy.family}",
        "architectures": [model],
        "auto_map": {"AutoConfig": f"{module}.{config}", "AutoModelForCausalLM": f"{module}.{model}"},
        "head_dim": cut.anatomy.blocks[0].head_dim,
        # Keys are padded to sort as numbers.
        "per_layer_config": {
            str(place).zfill(len(str(len(cut.kept_blocks) - 1))): _layer(cut, index)
            for place, index in enumerate(cut.kept_blocks)
        },
        "added_biases": cut.added_biases(),
    }
    template = resources.files("secateur.pruners") / "data" / "modeling.py.template"
    code = Template(template.read_text(encoding="utf-8")).substitute(
        parent=" ".join(parent.replace("\\", "/").replace('"', "'").split()),
        stock=stock,
        stock_config=stock_config,
        config=config,
        model=model,
        model_type=content["model_type"],
        container=cut.anatomy.blocks[0].name.rpartition(".")[0],
        parts=_parts(cut),
    )
    return content, cut.weights(), {f"{module}.py": code}


def _layer(cut: CutModel, index: int) -> dict[str, Any]:
    """Fields that differ from block to block, in the schema's flat names."""
    shape, kept = cut.shape(index), cut.kept[index]
    if not kept.kv_groups:  # a place in static caches, should the cache count its tokens here
        return {"skip": ["attention"], "num_key_value_heads": 1, "intermediate_size": kept.ffn}
    if not kept.ffn:
        return {**shape, "skip": ["mlp"], "intermediate_size": cut.anatomy.blocks[index].ffn_width}
    return shape


def _parts(cut: CutModel) -> str:
    """Python text: by sub-layer its module and its norms, as the removed ones show them: with empty weights."""
    kinds: tuple[Sublayer, ...] = ("attention", "mlp")
    block = cut.anatomy.blocks[0]
    return json.dumps({kind: (sublayer_path(block, kind), _norms(cut, kind)) for kind in kinds})


def _norms(cut: CutModel, kind: Sublayer) -> list[str]:
    for block, kept in zip(cut.anatomy.blocks, cut.kept, strict=True):
        own, other = (kept.kv_groups, kept.ffn) if kind == "attention" else (kept.ffn, kept.kv_groups)
        if own == 0 and other:
            path = f"{block.name}.{sublayer_path(block, kind)}."
            modules = dict(cut.anatomy.model.named_modules())
            empty = [
                name
                for name in block.norms
                if not name.startswith(path) and not any(p.numel() for p in modules[name].parameters())
            ]
            return [name.removeprefix(f"{block.name}.") for name in empty]
    return []
