"""Config and code for blocks of different shapes: one file around the stock class.

The code builds the stock class and gives each block the shapes that the config has, so that it takes nothing of a
family but what makes it cuttable (see `find_layouts`). Transformers' config has a schema for such blocks,
`per_layer_config` (https://github.com/huggingface/transformers/pull/45333); its models do not build from it, and a
stock `model_type` would load such a config without an error, with random layers. So the directory has a `model_type` of
its own, the class that builds it, and the schema for caches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from importlib import resources
from string import Template
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.export.cut import CutModel, sublayer_path
from secateur.pruners.export.stock import width_name
from secateur.pruners.models.anatomy import Block, Sublayer
from secateur.pruners.models.cutting import head_counts
from secateur.pruners.models.find_sublayer import OVER_TOKENS
from secateur.pruners.models.layout import Returns
from secateur.pruners.models.observed import observe, returns_of
from secateur.pruners.models.runner import BlockRunner
from secateur.spaces.architecture.candidate import Kept

SKIPPED: dict[Sublayer, Sublayer] = {
    "attention": "attention",
    "recurrent": "recurrent",
    "mlp": "mlp",
    "experts": "mlp",
}
"""Names of mixers in ``skip`` of a cut block."""


def heterogeneous_model(
    cut: CutModel, parent: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Content of the config, weights, and code files by name.

    Args:
        parent: the dense model's name, for the file's first line.

    Raises:
        ValueError: if the language tower is a part of a model.
    """
    if cut.is_nested:
        raise ValueError(
            f"Expected a model of text alone for blocks with shapes of their own, got "
            f"{type(cut.anatomy.model).__name__}, whose language tower is a part. Use `hf-stock` or `hf-padded`."
        )
    stock, stock_config = type(cut.anatomy.model).__name__, type(cut.config).__name__
    module = f"modeling_secateur_{cut.anatomy.family}"
    config, model = f"Secateur{stock_config}", f"Secateur{stock}"
    weights = cut.weights()
    content = cut.base_config() | {
        "model_type": f"secateur_{cut.anatomy.family}",
        "architectures": [model],
        "auto_map": {"AutoConfig": f"{module}.{config}", "AutoModelForCausalLM": f"{module}.{model}"},
        **cut.head_dim,
        # Keys are padded to sort as numbers.
        "per_layer_config": {
            str(place).zfill(len(str(len(cut.kept_blocks) - 1))): _layer(cut, index)
            for place, index in enumerate(cut.kept_blocks)
        },
        "cut_blocks": [_block(cut, index, weights) for index in cut.kept_blocks],
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
        outputs=repr({kind: astuple(_given(cut, kind)) for kind in _kinds(cut)}),
    )
    return content, weights, {f"{module}.py": code}


def _layer(cut: CutModel, index: int) -> dict[str, Any]:
    """Fields that differ from block to block, in transformers' flat names, as far as the config has them."""
    kept, known = cut.kept[index], cut.config.to_dict()
    fields: dict[str, Any] = {
        name: value
        for name, value in cut.shape(index).items()
        if name in known or cut.config.attribute_map.get(name) in known
    }
    attends = cut.anatomy.blocks[index].mixer("attention") is not None
    width = width_name(known) if cut.anatomy.blocks[index].ffn_width else None
    if not kept.kv_groups and attends:  # a place in static caches, should the cache count its tokens here
        fields = {name: 1 for name in fields if name == "num_key_value_heads"} | {"skip": ["attention"]}
    if kept.ffn and width is not None:
        fields[width] = kept.ffn
    if not kept.ffn and cut.anatomy.blocks[index].ffn_units:
        fields |= {"skip": [*fields.get("skip", ()), "mlp"]} | (
            {} if width is None else {width: cut.anatomy.blocks[index].ffn_width}
        )
    return {name: value for name, value in fields.items() if name != "intermediate_size" or width == name}


def _block(cut: CutModel, index: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Config entries for the exported code: removed sub-layers, sizes of linears, numbers of heads."""
    block, kept = cut.anatomy.blocks[index], cut.kept[index]
    removed = {x.kind: not (kept.kv_groups if x.kind in OVER_TOKENS else kept.ffn) for x in block.mixers}
    saved, shapes = cut.saved_name(index), dict[str, list[int]]()
    for linear in block.linears:
        if not removed[linear.sublayer] and linear.expert is None:
            own = linear.name.removeprefix(block.name)
            shape = list(weights[f"{saved}{own}.weight"].shape)
            shapes[own.removeprefix(".")] = shape[::-1] if linear.transposed else shape
    owner: Any = block.module.get_submodule(sublayer_path(block, "attention")) if kept.kv_groups else None
    counts = head_counts(kept.kv_groups, cut.heads_per_group(index), block.head_dim)
    names = ("num_attention_heads", "num_key_value_heads") if block.n_heads else ()
    return {
        "skip": [name for kind, name in SKIPPED.items() if removed.get(kind)],
        "linears": shapes,
        "attention": {name: value for name, value in counts.items() if hasattr(owner, name)} if names else {},
        "config": {name: counts[name] for name in names},
        **_further(block, saved, kept, weights),
        **({} if any(kept.units) else {"norms": [x.removeprefix(f"{block.name}.") for x in block.norms]}),
    }


def _further(block: Block, saved: str, kept: Kept, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config entries of kept tensors that are no linears: vectors of heads, and those of a mixture."""
    attention = block.mixer("attention")
    names = [x.name.removeprefix(f"{block.name}.") for x in attention.vectors] if attention else []
    vectors = {name: list(weights[f"{saved}.{name}"].shape) for name in names if kept.kv_groups}
    experts = _experts(block, saved, kept.ffn, weights) if block.mixture and kept.ffn else {}
    tensors = vectors | experts.pop("tensors", {})
    return experts | ({"tensors": tensors} if tensors else {})


def _experts(block: Block, saved: str, n_kept: int, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config entries of a mixture: shapes of tensors with an entry an expert, and numbers of experts."""
    mixture = block.mixture
    assert mixture is not None
    paths = {module: path for path, module in block.module.named_modules()}
    inside = f"{paths[mixture.experts]}."
    tensors = [f"{paths[x.module]}.{x.name}" for x in mixture.entries]
    tensors += [
        n for name in weights if (n := name.removeprefix(f"{saved}.")).startswith(inside) and n != name
    ]
    numbers: dict[str, dict[str, int]] = {inside[:-1]: {"num_experts": n_kept}}
    for module, name, value in mixture.numbers(n_kept):
        numbers.setdefault(paths[module], {})[name] = value
    return {"tensors": {name: list(weights[f"{saved}.{name}"].shape) for name in tensors}, "numbers": numbers}


def _parts(cut: CutModel) -> str:
    """Python text: by sub-layer its modules and its norms, as the removed ones show them: with empty weights."""
    return json.dumps({kind: (_modules(cut, kind), _norms(cut, kind)) for kind in _kinds(cut)})


def _kinds(cut: CutModel) -> list[Sublayer]:
    """Kinds of sub-layers of the model, by their names in `skip`."""
    found = {SKIPPED[mixer.kind] for block in cut.anatomy.blocks for mixer in block.mixers}
    return [kind for kind in dict.fromkeys(SKIPPED.values()) if kind in found]


def _with(cut: CutModel, kind: Sublayer) -> list[Block]:
    """The blocks that have a sub-layer of this kind."""
    return [x for x in cut.anatomy.blocks if kind in {SKIPPED[mixer.kind] for mixer in x.mixers}]


def _modules(cut: CutModel, kind: Sublayer) -> list[str]:
    """The sub-layer's module, or its projections where it has none of its own (OPT's MLP).

    Of a mixture also modules of shared experts beside it.
    """
    block = _with(cut, kind)[-1]
    path, own = sublayer_path(block, kind), f"{block.name}."
    inner = [x.name.removeprefix(own) for x in block.linears if x.sublayer == kind]
    if block.mixture is not None and kind == "mlp":
        shared = [x.name.removeprefix(own) for x in block.linears if x.sublayer == "experts" and not x.expert]
        children = dict.fromkeys(name.partition(".")[0] for name in shared)
        return [*(child for child in children if child != path.partition(".")[0]), path]
    return [path] if path else inner


def _norms(cut: CutModel, kind: Sublayer) -> list[str]:
    for block in _with(cut, kind):
        kept = cut.kept[block.index]
        own, other = (kept.kv_groups, kept.ffn) if kind in OVER_TOKENS else (kept.ffn, kept.kv_groups)
        if own == 0 and other:
            path = f"{block.name}.{sublayer_path(block, kind)}."
            modules = dict(cut.anatomy.model.named_modules())
            norms = {name: [*modules[name].parameters()] for name in block.norms}
            empty = [
                name
                for name, parameters in norms.items()
                if not name.startswith(path) and parameters and not any(p.numel() for p in parameters)
            ]
            return [name.removeprefix(f"{block.name}.") for name in empty]
    return []


@torch.no_grad()
def _given(cut: CutModel, kind: Sublayer) -> Returns:
    """Outputs of the sub-layer's module, as the first block with it returns them; a removed one returns as many."""
    kept = [of.kv_groups if kind in OVER_TOKENS else of.ffn for of in cut.kept]
    having = _with(cut, kind)
    block = next((block for block in having if kept[block.index]), having[0])
    path = sublayer_path(block, kind)
    if not path:
        return Returns()
    owner, runner = block.module.get_submodule(path), BlockRunner(cut.anatomy)
    seen = observe(runner, block, runner.start(torch.zeros(1, 2, dtype=torch.int64)))
    return returns_of(owner, seen)
