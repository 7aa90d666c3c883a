"""Same masks, same formula: what a formula does to probe layers, as one short text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.pruners.formulas.probe import Probe
from secateur.pruners.masks import prune_ranks
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.methods import Comparison


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a formula on probes.

    Args:
        digest: equal for formulas that prune the same weights of every probe; "" if the formula is infeasible.
        reason: why it is infeasible, or "".
    """

    digest: str
    reason: str = ""


def fingerprint(
    tree: Tree,
    probes: Sequence[Probe],
    sparsities: Sequence[float],
    *,
    comparison: Comparison = "output",
    group_size: int | None = None,
) -> Fingerprint:
    """The fingerprint of a formula: a hash of its masks on the probes.

    Formulas that rank the weights of every comparison group alike have the same one: those inside a rising
    function, scaled by a positive number, per row scaled or shifted if rows are compared. The opposite need not
    hold: formulas with equal fingerprints agree on the probes and at these sparsities.

    Infeasible are formulas that are undefined, constant in each group, or blind: within a row of any probe they
    keep the same places whatever the weights, as do functions of X alone, and of R, where all places are tied.

    On the Gaussian probes (6,656 weights) it takes about 2 ms.

    Args:
        tree: the formula.
        probes: layers, each of at least two rows.
        sparsities: where masks are compared, each within (0, 1).
        comparison, group_size: who competes with whom; see `masks.prune_ranks`.
    """
    levels = (0.0, *sorted(set(sparsities)))
    digest, blind = hashlib.sha256(), True
    for index, probe in enumerate(probes):
        try:
            score = scores(
                tree,
                probe.terminals,
                probe.shape,
                comparison=comparison,
                group_size=group_size,
                name=f"probe {index}",
            )
        except FormulaError as error:
            return Fingerprint("", str(error))
        ranks = prune_ranks(score, levels, comparison=comparison, group_size=group_size)
        blind = blind and _same_rows(score, levels, group_size)
        digest.update(ranks.numpy().tobytes())
    if blind:
        return Fingerprint("", "Expected scores that depend on the weights, got the same mask in every row.")
    return Fingerprint(digest.hexdigest()[:32])


def _same_rows(score: Float[Tensor, "rows in"], levels: Sequence[float], group_size: int | None) -> bool:
    """True if all rows lose the same weights when each loses its share."""
    ranks = prune_ranks(score, levels, group_size=group_size or score.shape[1])
    return torch.equal(ranks, ranks[:1].expand_as(ranks))
