"""Fairness-aware pruning: heads go first without which a bias is lowest, but for those that quality needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.stream import mean_loss, stream_blocks
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.runner import BlockRunner, in_fp32
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.wanda_sp import wanda_sp

CRITICAL = 0.3
"""Share of the heads that quality needs most, which stay: the paper's gamma."""

N_TOKENS = 2048
"""Tokens of each text, at most, that a head's effects are measured on."""


def fairness(evidence: Evidence) -> Float[Tensor, " units"]:
    """Fairness-aware structured pruning (Zayed et al. 2024, arXiv 2312.15398), see `fairness_scores`."""
    return evidence.gradient("fairness", evidence.layout.output)


@torch.no_grad()
def fairness_scores(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], contrast: Int[Tensor, "others _"]
) -> dict[str, Float[Tensor, " units"]]:
    """Score of each unit, comparable over the model, from the effects of leaving out one KV group at a time.

    The share `CRITICAL` of the groups without which the loss on the calibration text is highest stays. Of the others
    those go first without which the bias is lowest: here the likelihood of the contrast text, which is to be one that
    the model should not prefer, such as stereotypes. A group's score is its place among all.

    Differences from the paper: it measures the toxicity of continuations of prompts about groups of people by a
    classifier, for which there is none here; KV groups in place of heads, which are the same without grouping. It cuts
    heads alone: channels of MLPs, which would go behind all groups, are by `wanda_sp`. `CRITICAL` is one of the values
    that its code tries, 0.2 to 0.7.

    Args:
        anatomy: the dense model; left as it was.
        tokens: windows of the calibration text.
        contrast: windows of the text whose likelihood is to fall.

    Returns:
        For each output projection by its full name, in fp32 on its device.

    Raises:
        ValueError: if the model can't be cut (see `find_layouts`), or a loss is not finite.
    """
    layouts = [part for layout in find_layouts(anatomy) for part in layout.sublayers]
    attentions = [part for part in layouts if part.kind == "attention"]
    with in_fp32(anatomy.model):
        quality, bias = (
            torch.cat([*losses_without(anatomy, attentions, few(text))]) for text in (tokens, contrast)
        )
    places = places_of(quality, -bias)
    found = dict(
        zip([x.output.name for x in attentions], places.split([x.n_units for x in attentions]), strict=True)
    )
    for block in stream_blocks(anatomy, few(tokens), outputs="moments"):
        for layout in (x for x in layouts if x.output.name in block.outputs and x.kind != "attention"):
            prior = wanda_sp(Evidence(layout, block.outputs[layout.output.name], {}, dampening=0.0)).cpu()
            found[layout.output.name] = len(places) + prior / prior.max().clamp_min(1e-30)
    return {x.output.name: found[x.output.name].float().to(x.output.weight.device) for x in layouts}


def places_of(quality: Float[Tensor, " heads"], bias: Float[Tensor, " heads"]) -> Float[Tensor, " heads"]:
    """Place of each head in the order in which they stay: the higher the later it goes.

    Args:
        quality: loss without the head.
        bias: of the model without the head.
    """
    n_loose = len(quality) - int(CRITICAL * len(quality))
    by_quality = quality.argsort(stable=True)
    loose, critical = by_quality[:n_loose], by_quality[n_loose:]
    order = torch.cat([loose[bias[loose].argsort(stable=True)], critical])
    return torch.empty(len(order)).scatter_(0, order, torch.arange(len(order), dtype=torch.float32))


def losses_without(
    anatomy: Anatomy, attentions: list[SublayerLayout], tokens: Int[Tensor, "windows length"]
) -> Iterator[Float[Tensor, " units"]]:
    """Yield for each attention, in the order of the blocks, the losses without each of its units, in nats per token."""
    runner = BlockRunner(anatomy)
    tokens = tokens.to(runner.device)
    inputs = runner.start(tokens)
    hidden, done = inputs.hidden, 0
    for layout in attentions:
        first = layout.output.block
        for index in range(done, first):
            hidden = runner.block(index, hidden, inputs)
        done, losses = first, []
        for unit in range(layout.n_units):
            kept = torch.ones(layout.n_units, device=runner.device)
            kept[unit] = 0
            columns = kept.repeat_interleave(layout.unit_width)
            hook = layout.output.module.register_forward_pre_hook(
                lambda _, args, columns=columns: (args[0] * columns, *args[1:])
            )
            try:
                found = hidden
                for index in range(first, len(anatomy.blocks)):
                    found = runner.block(index, found, inputs)
            finally:
                hook.remove()
            losses.append(mean_loss(anatomy, found, tokens))
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"Expected finite losses, got {losses} at {layout.name}. Check the calibration text."
            )
        yield torch.tensor(losses, dtype=torch.float64)


def few(tokens: Int[Tensor, "windows length"]) -> Int[Tensor, "some length"]:
    """The first windows, of at most `N_TOKENS` tokens, one at least."""
    return tokens[: max(1, N_TOKENS // tokens.shape[1])]
