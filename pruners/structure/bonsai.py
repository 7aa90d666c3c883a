"""Bonsai: effects of units on the loss, by regression over masks that leave out random halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from secateur.pruners.calibration.stream import mean_loss, stream_blocks
from secateur.pruners.calibration.zeroth_order import forward_bytes
from secateur.pruners.masks import lowest
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.runner import BlockRunner, fp32_bytes, in_fp32
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.wanda_sp import wanda_sp
from secateur.spaces.levels import n_zeros

N_PAIRS = 32

N_TOKENS = 512

SHARE = 0.5
"""Share of the units of each sub-layer that may be left out, half of them at a time."""

ROUND_PAIRS, ROUND_SHARE = 100, 0.1
"""The paper's 200 masks of a round, of the lowest tenth of the units, for a round that removes a twentieth."""

PENALTIES = tuple(10.0**power for power in range(-4, 5))

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class _Sublayer:
    """Units of a sub-layer that may be left out.

    Args:
        layout: of the dense sub-layer.
        prior: of all units, higher = keep.
        loose: the units of the lowest prior, of those that are there.
    """

    layout: SublayerLayout
    prior: Float[Tensor, " units"]
    loose: Int[Tensor, " loose"]


@torch.no_grad()
def round_scores(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, n_pairs: int = ROUND_PAIRS, seed: int = 0
) -> dict[str, Float[Tensor, " units"]]:
    """Increase of the loss without a unit, in nats per token, for one round of Bonsai.

    Bonsai (Dery et al. 2024, arXiv 2402.05406): with ``schedule: {step: 0.05}`` and one threshold a round removes a
    twentieth of the dense model, and the next one measures what is left anew. Of each sub-layer the tenth of its units
    with the lowest prior, one at least, may be left out; each of 100 masks leaves out half of those, of all sub-layers
    together, and comes with its complement; one regression over all of them gives the effects.

    Differences from the paper: the regression, see `ridge`, and the loss in place of perplexity; the prior has no
    other form than `importance.wanda_sp`; whole KV groups in place of heads. No training between or behind the rounds.

    Args:
        anatomy: the dense model, or one whose units that are gone have zero columns; left as it was.
        tokens: calibration windows of at least two tokens; 32 as published.
        n_pairs: of masks; two forward passes each.
        seed: of the masks.

    Raises:
        ValueError: as `perturbation_scores`.
    """
    sublayers = _sublayers(anatomy, tokens, lambda n: n - int(n * (1 - ROUND_SHARE) + 1e-9))
    return _regressed(anatomy, tokens, [sublayers], n_pairs, seed)


@torch.no_grad()
def perturbation_scores(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, n_pairs: int = N_PAIRS, seed: int = 0
) -> dict[str, Float[Tensor, " units"]]:
    """Increase of the loss without a unit, in nats per token, by regression over random masks.

    Bonsai (Dery et al. 2024, arXiv 2402.05406): forward passes alone. Of each sub-layer the half of the units with the
    lowest prior (`importance.wanda_sp`) may be left out. A mask leaves out half of those, drawn in proportion to the
    largest prior minus their own; it comes with its complement, which leaves out the other half. A linear regression
    of the loss on the masks gives the units' effects. Units outside the half were never left out: they stand above
    all others, in the order of their prior.

    Differences from the paper. One round, where Bonsai cuts 5 % at a time and measures the cut model anew: so it is
    the prior where more than half of a sub-layer is removed. Attentions and MLPs are masked in turn, with a regression
    each, as the effect of one group drowns those of channels. The regression, see `ridge`, is in closed form, of the
    loss in place of perplexity, and draws to the prior in place of zero: 128 masks in all, on the first 512
    calibration tokens, are few for thousands of units, where Bonsai takes 200 a round on 32 windows.

    Args:
        anatomy: the dense model; left as it was.
        tokens: calibration windows of at least two tokens.
        n_pairs: of masks, for each kind of sub-layer; two forward passes each.
        seed: of the masks.

    Returns:
        For each output projection by its full name a score a unit, comparable over the model.

    Raises:
        ValueError: if the model can't be cut (see `find_layouts`), or a loss is not finite.
    """
    sublayers = _sublayers(anatomy, tokens, lambda n: n_zeros(SHARE, n))
    kinds = dict.fromkeys(x.layout.kind for x in sublayers)
    together = [[x for x in sublayers if x.layout.kind == kind] for kind in kinds]
    few = tokens[: math.ceil(N_TOKENS / tokens.shape[1])]
    return _regressed(anatomy, few, together, n_pairs, seed)


def _regressed(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    together: Sequence[Sequence[_Sublayer]],
    n_pairs: int,
    seed: int,
) -> dict[str, Tensor]:
    """Scores of all units.

    Args:
        together: sub-layers that are masked, and regressed over, at once.
    """
    generator = torch.Generator().manual_seed(seed)
    with in_fp32(anatomy.model):
        runner = BlockRunner(anatomy)
        few = tokens.to(runner.device)
        inputs = runner.start(few)

        def loss_without(gone: Sequence[tuple[_Sublayer, Tensor]]) -> float:
            with ExitStack() as hooks:
                for sublayer, units in gone:
                    hooks.callback(_leave_out(sublayer, units).remove)
                return mean_loss(anatomy, runner.run(inputs), few)

        found: list[tuple[_Sublayer, Tensor]] = []
        for alike in together:
            effects = _effects(alike, loss_without, n_pairs, generator)
            found += zip(alike, effects.split([len(x.loose) for x in alike]), strict=True)
    return _scores(found)


def perturbation_bytes(anatomy: Anatomy, length: int) -> int:
    """Estimated memory of `perturbation_scores` beyond the model, in bytes: that of forward passes.

    Args:
        anatomy: the model.
        length: tokens of a window.
    """
    return fp32_bytes(anatomy.model) + forward_bytes(anatomy, length)


def _sublayers(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], n_loose: Callable[[int], int]
) -> list[_Sublayer]:
    """Sub-layers with their loose units, as many as `n_loose` says of so many that are there."""
    layouts = find_layouts(anatomy, experts=True)
    found = []
    for part, block in zip(stream_blocks(anatomy, tokens, outputs="moments"), layouts, strict=True):
        for layout in block.sublayers:
            evidence = Evidence(layout, part.outputs[layout.output.name], {}, dampening=0.0)
            prior = wanda_sp(evidence).double().cpu()
            if not torch.isfinite(prior).all():
                raise ValueError(
                    f"Expected finite inputs, got NaN or infinity at {layout.name}. Check the calibration text."
                )
            there = _there(layout)
            loose = there[lowest(prior[there], n_loose(len(there))).nonzero().flatten()]
            found.append(_Sublayer(layout, prior, loose))
    return found


def _there(layout: SublayerLayout) -> Int[Tensor, " units"]:
    """Units whose columns of the output projection are not all zero; all of them where none are there."""
    columns = (layout.output.weight != 0).any(0).reshape(layout.n_units, -1).any(1).cpu()
    return (columns if columns.any() else torch.ones_like(columns)).nonzero().flatten()


def _effects(
    sublayers: Sequence[_Sublayer],
    loss_without: Callable[[Sequence[tuple[_Sublayer, Tensor]]], float],
    n_pairs: int,
    generator: torch.Generator,
) -> Float[Tensor, " all_loose"]:
    """Effects of the loose units of these sub-layers, one sub-layer after another."""
    signs, differences = [], []
    for _ in range(n_pairs):
        halves = [_half(x, generator) for x in sublayers]
        one, other = (
            loss_without([*zip(sublayers, gone, strict=True)])
            for gone in (halves, [~half for half in halves])
        )
        if not math.isfinite(one - other):
            raise ValueError(f"Expected finite losses, got {one} and {other}. Check the calibration text.")
        signs.append(torch.cat(halves).double() * 2 - 1)
        differences.append(one - other)
    prior = torch.cat([x.prior[x.loose] for x in sublayers])
    return ridge(torch.stack(signs), torch.tensor(differences, dtype=torch.float64), prior)


def _half(sublayer: _Sublayer, generator: torch.Generator) -> Bool[Tensor, " loose"]:
    """True for half of the loose units; of an odd number one more or one less, by chance."""
    size = len(sublayer.loose)
    count = (size + int(torch.randint(2, (), generator=generator))) // 2
    half = torch.zeros(size, dtype=torch.bool)
    if count:
        prices = sublayer.prior.max() - sublayer.prior[sublayer.loose]
        chances = prices + 1e-6 * prices.max() + TINY
        half[torch.multinomial(chances / chances.sum(), count, generator=generator)] = True
    return half


def _leave_out(sublayer: _Sublayer, gone: Bool[Tensor, " loose"]) -> RemovableHandle:
    """Hook that sets the inputs of the output projection from these units to zero."""
    output, width = sublayer.layout.output, sublayer.layout.unit_width
    kept = torch.ones(sublayer.layout.n_units, device=output.weight.device)
    kept[sublayer.loose[gone].to(kept.device)] = 0.0
    columns = kept.repeat_interleave(width)
    return output.module.register_forward_pre_hook(lambda _, args: (args[0] * columns, *args[1:]))


def ridge(
    signs: Float[Tensor, "pairs units"], differences: Float[Tensor, " pairs"], prior: Float[Tensor, " units"]
) -> Float[Tensor, " units"]:
    """Effect of each unit, from the differences of the losses without one half and without the other.

    A linear loss differs by the sum of ``sign * effect``; the mean of a pair says nothing. Effects are the prior times
    the factor that fits best, not below 0, and a ridge regression of the rest. Its penalty, relative to the
    number of units, is the one of `PENALTIES` with the least squared error on pairs that are left out, each once.

    Args:
        signs: 1 for a unit that the pair's first mask leaves out, -1 for one that its second does.
        differences: the first loss less the second one.
        prior: of each unit, up to a factor.
    """
    expected = signs @ prior
    factor = (expected @ differences / expected.square().sum().clamp_min(TINY)).clamp_min(0.0)
    rest = differences - factor * expected
    kernel = signs @ signs.T
    found: list[tuple[float, Tensor]] = []
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(kernel + penalty * signs.shape[1] * torch.eye(len(kernel)).to(kernel))
        dual = inverse @ rest
        error = float((dual / inverse.diagonal()).square().mean())
        found.append((error, factor * prior + signs.T @ dual))
    return min(found, key=lambda pair: pair[0])[1]


def _scores(found: Sequence[tuple[_Sublayer, Tensor]]) -> dict[str, Tensor]:
    """Effects of loose units; all others above the largest of the model, by their prior."""
    every = torch.cat([effects for _, effects in found])
    top = float(every.max())
    span = top - float(every.min()) or 1.0
    scores = {}
    for sublayer, effects in found:
        score = top + span * (1 + sublayer.prior / sublayer.prior.max().clamp_min(TINY))
        score[sublayer.loose] = effects
        output = sublayer.layout.output
        scores[output.name] = score.float().to(output.weight.device)
    return scores


def bonsai_round(evidence: Evidence) -> Float[Tensor, " units"]:
    """Increase of the loss without the unit, see `round_scores`."""
    return evidence.gradient("perturbed_round", evidence.layout.output)


def bonsai(evidence: Evidence) -> Float[Tensor, " units"]:
    """Increase of the loss without the unit, see `perturbation_scores`."""
    return evidence.gradient("perturbed", evidence.layout.output)
