"""Names under which checkpoints store what transformers renames, and stacks from single experts, as it loads them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, stack

from secateur.pruners.models.experts import DOWN, FORMS, Experts, equals, is_fused, up_name

RENAMED = (
    (".block_sparse_moe.", ".mlp."),  # Mixtral
    (".block_sparse_moe.gate.", ".mlp.router."),  # PhiMoE
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),  # GraniteMoE
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),  # Ernie 4.5
)
"""Parts of stored names with those that the classes of transformers have for them; see its `conversion_mapping`."""

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
PROJECTIONS = {name: name for name in ("gate_proj", "up_proj", "down_proj")} | {
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""Projections of an expert by their stored names."""

N_PROBED = 2
"""Experts of a mixture that its form is found by."""


def stored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The stored name of each parameter and buffer of a model, by its own.

    Fused experts that are stored one by one are split, see `Experts`, so that each projection is a parameter.

    Args:
        model: without memory; changed.
        tensors: all that are stored, by name. Names that are not understood stand for themselves.

    Raises:
        ValueError: if fused experts compute something else than experts of gate, up and down.
    """
    known = model.state_dict().keys()
    fused = {path: module for path, module in model.named_modules() if is_fused(module)}
    found, split = dict[str, str](), dict[str, dict[str, str]]()
    for name in tensors:
        spellings = [name, *(name.replace(old, new) for old, new in RENAMED if old in name)]
        own = next((x for x in spellings if x in known), None)
        matches = [match for x in spellings if (match := EXPERT.fullmatch(x)) and match[1] in fused]
        if own is None and matches and matches[0][3] in PROJECTIONS:
            [match, *_] = matches
            own = f"{match[1]}.{match[2]}.{PROJECTIONS[match[3]]}.weight"
            split.setdefault(match[1], {})[own] = name
        found[own or name] = name
    for path, of_mixture in split.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        few = {own: tensors[name] for own, name in of_mixture.items()}
        setattr(parent, path.rpartition(".")[2], _split(path, fused[path], few))
    return found


def _split(path: str, fused: nn.Module, tensors: Mapping[str, Tensor]) -> Experts:
    """The experts of a fused module without memory, as they are stored."""
    probe: Any = copy.copy(fused)
    few = range(min(N_PROBED, getattr(fused, DOWN).shape[0]))
    probe.num_experts = len(few)

    def stacked(projection: str) -> Tensor:
        return stack([tensors[f"{path}.{index}.{projection}.weight"] for index in few])

    ups = [stacked(x) for x in ("gate_proj", "up_proj") if f"{path}.0.{x}.weight" in tensors]
    joined = ups[0] if len(ups) == 1 else ups[0].new_empty(0)
    if len(ups) > 1:
        joined = stack(ups, 1).flatten(1, 2)
    probe._parameters = {
        up_name(fused): nn.Parameter(joined, requires_grad=False),
        DOWN: nn.Parameter(stacked(DOWN), requires_grad=False),
    }
    forms = (form for form in FORMS if not form.transposed and not form.interleaved)
    form = next((form for form in forms if equals(probe, form)), None)
    if form is None:
        raise ValueError(
            f"Expected fused experts with gate, up and down projections, got {type(fused).__name__}, which computes "
            f"something else [at {path}]. This mixture can't be pruned."
        )
    experts = Experts(fused, form)
    for parameter in fused.parameters(recurse=False):
        parameter.data = parameter.data.new_empty(0)
    return experts
