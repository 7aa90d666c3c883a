"""Pruning by Explaining: relevance of units for the predictions, by layer-wise relevance propagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.backward import CHUNK_TOKENS, backward_blocks, head_gradient
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.runner import BlockRunner, in_fp32
from secateur.pruners.structure.evidence import Evidence

PRODUCT = 0.5
"""Share of the relevance of a product that each factor gets."""


def relevance(evidence: Evidence) -> Float[Tensor, " units"]:
    """Mean relevance of the unit's outputs for the logits of the next tokens, see `relevances`.

    Pruning by Explaining (Hatefi et al. 2024, arXiv 2408.12568): the least relevant units go first. The calibration
    text is the set of reference samples: what is relevant for it is kept. Signed, as in the paper: a unit that speaks
    against the predictions goes before one without effect.
    """
    return evidence.by_unit(evidence.gradient("relevance", evidence.layout.output)).sum(1)


def relevances(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, Float[Tensor, " in"]]:
    """Relevance of each input channel of output projections: sum over a window's tokens, mean over the windows.

    Rules of AttnLRP (Achtibat et al. 2024, arXiv 2402.05602), by modified gradients, as relevance is then input times
    gradient: epsilon rule, epsilon 0, for projections; identity for norms and activations; halves for the factors of
    products (attention and values, queries and keys, gate and up); the softmax by its Taylor expansion. Relevance
    begins as the logit of the token that follows, of every position. The paper prunes vision transformers, with rules
    that a search fits to a data set; those of language models are these.

    Args:
        anatomy: the dense model; not changed.
        tokens: windows of at least two tokens.

    Returns:
        For the output projection of each attention and MLP by its full name, in fp32 on its device.

    Raises:
        ValueError: if there is no rule for a part of the model, or a value is not finite.
    """
    check_rules(anatomy)
    runner, outputs = BlockRunner(anatomy), [x for x in anatomy.linears if x.is_output]
    found = {x.name: torch.zeros(x.in_features, device=x.weight.device) for x in outputs}

    def add(linear: Linear, inputs: Tensor, gradients: Tensor) -> None:
        found[linear.name] += (inputs * (gradients @ linear.weight)).sum(0)

    with in_fp32(anatomy.model), _rules(anatomy):
        for window in tokens:
            targets = window[1:, None].to(runner.device)

            def top(number: int, hidden: Tensor, targets: Tensor = targets) -> Tensor:
                def chosen(
                    chunk: int, logits: Float[Tensor, "tokens vocab"]
                ) -> Float[Tensor, "tokens vocab"]:
                    labels = targets[chunk * CHUNK_TOKENS :][: len(logits)]
                    rest = torch.zeros_like(logits)
                    rest[: len(labels)] = rest[: len(labels)].scatter(1, labels, 1.0)
                    return rest

                gradient = head_gradient(anatomy, hidden, chosen)
                gradient[:, : anatomy.first_scored] = 0
                return gradient

            for _ in backward_blocks(anatomy, [runner.start(window[None])], top, add, watched=found.keys()):
                pass
    return {name: total / len(tokens) for name, total in found.items()}


def check_rules(anatomy: Anatomy) -> None:
    """Raise a ValueError, which names the part, if there is no rule for a part of the model."""
    for block in anatomy.blocks:
        missing = {mixer.kind for mixer in block.mixers} - {"attention", "mlp"}
        what = f"of {', '.join(sorted(missing))}" if missing else ""
        if any(linear.role in ("kv", "in") for linear in block.linears):
            what = what or "of latent attention"
        if block.mixer("mlp") is not None and not _activations(block):
            what = what or "of an activation that is no module"
        if what:
            raise ValueError(
                f"Expected a model of attention and MLPs with rules of relevance, got one {what} at {block.name}. Use "
                "another importance (`secateur list importances`)."
            )


@contextmanager
def _rules(anatomy: Anatomy) -> Iterator[None]:
    """Context in which gradients of the blocks and of the final norm follow the rules."""
    norms = [name for block in anatomy.blocks for name in block.norms]
    modules = [anatomy.model.get_submodule(name) for name in filter(None, [*norms, anatomy.final_norm])]
    modules += [module for block in anatomy.blocks for module in _activations(block)]
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(_identity).remove)
        fused = _fused_shares(anatomy)
        for block in anatomy.blocks:
            gated = any(linear.role in ("gate", "gate_up") for linear in block.linears)
            for linear in block.linears:
                share = fused.get(linear.name, _share(linear, gated=gated))
                if share is not None:
                    stack.callback(linear.module.register_forward_hook(_scaling(share)).remove)
        yield


def _activations(block: Block) -> list[nn.Module]:
    return [
        module
        for module in block.module.modules()
        if type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
        and not isinstance(module, nn.Softmax)
    ]


def _identity(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output as its input times a constant, so that input times gradient is the same before and behind."""
    inputs, given = args[0], output.detach()
    ratio = torch.where(inputs == 0, torch.zeros_like(given), given / inputs.detach())
    return torch.where(inputs == 0, given, inputs * ratio)


def _scaling(share: Tensor | float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * share)

    return hook


def _share(linear: Linear, *, gated: bool) -> float | None:
    """Share of its outputs' relevance: of queries and keys, which are in two products, of values, of gate and up."""
    if linear.sublayer == "attention":
        return {"q": PRODUCT**2, "k": PRODUCT**2, "v": PRODUCT}.get(linear.role)
    return PRODUCT if gated and linear.role in ("gate", "up", "gate_up") else None


def _fused_shares(anatomy: Anatomy) -> dict[str, Float[Tensor, " out"]]:
    """Shares of the outputs of fused queries, keys and values, by the projection's full name."""
    if all(linear.role != "qkv" for linear in anatomy.linears):
        return {}
    found = {}
    for part in (part for layout in find_layouts(anatomy) for part in layout.sublayers):
        for place in (x for x in part.placements if x.linear.role == "qkv"):
            sizes = place.parts
            if len(sizes) == 1:  # head by head
                width = (sizes[0] - place.queries) // 2
                sizes = (place.queries, width, width)
            shares = zip(sizes, (PRODUCT**2, PRODUCT**2, PRODUCT), strict=True)
            repeats = 1 if len(place.parts) == 1 else part.n_units
            unit = torch.cat([torch.full((size * repeats,), share) for size, share in shares])
            found[place.linear.name] = unit.repeat(part.n_units // repeats).to(place.linear.weight.device)
    return found
