"""Fingerprints of formulas: their masks of probes, a few small layers, before anything is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.pruners.formulas.terminals import Terminals, some_rows
from secateur.pruners.masks import prune_ranks
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.method import Comparison


def fingerprint(
    tree: Tree,
    probes: Sequence[Terminals],
    sparsities: Sequence[float],
    *,
    comparison: Comparison = "output",
    group_size: int | None = None,
) -> str:
    """Hash of a formula's masks on the probes.

    Formulas that rank the weights of every comparison group alike have the same one: those inside a rising
    function, scaled by a positive number, per row scaled or shifted if rows are compared. The opposite need not
    hold: formulas with equal fingerprints agree on the probes and at these sparsities.

    On the Gaussian probes (6,656 weights) it takes about 2 ms.

    Args:
        tree: the formula.
        probes: layers, each of at least two rows.
        sparsities: where masks are compared, each within (0, 1).
        comparison, group_size: who competes with whom; see `masks.prune_ranks`.

    Raises:
        FormulaError: if the formula is undefined, constant in each group, or blind: within a row of any probe it keeps
            the same places whatever the weights, as do functions of X alone, and of R, where all places are tied.
    """
    levels = (0.0, *sorted(set(sparsities)))
    digest, blind = hashlib.sha256(), True
    for index, probe in enumerate(probes):
        score = scores(
            tree,
            probe,
            (*probe["W"].shape,),
            comparison=comparison,
            group_size=group_size,
            name=f"probe {index}",
        )
        ranks = prune_ranks(score, levels, comparison=comparison, group_size=group_size)
        blind = blind and _same_rows(score, levels, group_size)
        digest.update(ranks.numpy().tobytes())
    if blind:
        raise FormulaError("Expected scores that depend on the weights, got the same mask in every row.")
    return digest.hexdigest()[:32]


def _same_rows(score: Float[Tensor, "rows in"], levels: Sequence[float], group_size: int | None) -> bool:
    """True if all rows lose the same weights when each loses its share."""
    ranks = prune_ranks(score, levels, group_size=group_size or score.shape[1])
    return torch.equal(ranks, ranks[:1].expand_as(ranks))


def probe_of(terminals: Mapping[str, Float[Tensor, "_ _"]], rows: int = 16) -> Terminals:
    """Probe of a layer: the terminals of some rows, evenly spread over the layer, in fp64.

    Rounding then ties fewer weights than in fp32, so that ``log(x)`` ranks like ``x``. R, C and the like are those of
    the whole layer; minmax, zscore and rank see the chosen rows alone.
    """
    return {name: x.double().cpu() for name, x in some_rows(terminals, rows).items()}


def gaussian_probes(
    seed: int = 0, shapes: Sequence[tuple[int, int]] = ((16, 96), (16, 192), (16, 128))
) -> tuple[Terminals, ...]:
    """Probes without a model: Gaussian weights and gradients, inputs and rows of uneven size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def one(index: int, n_out: int, n_in: int) -> Terminals:
        inputs, rows = normal(1, n_in).exp(), (normal(n_out, 1) / 2).exp()
        weight = 0.05 * normal(n_out, n_in) * rows / inputs.sqrt()
        return {
            "W": weight,
            "G": 1e-3 * (normal(n_out, n_in) * inputs * (normal(n_out, 1) / 2).exp()).abs(),
            "X": inputs,
            "H": (normal(1, n_in) / 3).exp() / inputs.square(),
            "R": weight.abs().sum(1, keepdim=True),
            "C": weight.abs().sum(0, keepdim=True),
            "P": torch.full((1, 1), index / max(len(shapes) - 1, 1), dtype=torch.float64),
        }

    return tuple(one(i, *shape) for i, shape in enumerate(shapes))
