"""Foretold loss of units by Kronecker-factored curvature, one by one and in the order of greedy removal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import RIDGE, dampened, factor
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.obs import obs_order, places


def kfac(evidence: Evidence) -> Float[Tensor, " units"]:
    """Loss in nats a token of removing each unit alone, nothing else changed: ``tr(B W_S A_SS W_S^T) / 2``.

    W_S are the unit's columns of the output projection, A the second moment of its inputs and B that of the gradients
    of its outputs (K-FAC, Martens and Grosse 2015, arXiv 1503.05671), for drawn labels. In one unit in all layers, so
    the rule `global` may compare them.
    """
    width, weight = evidence.layout.unit_width, evidence.weight.double()
    product = weight.T @ evidence.gradient("fisher_outputs", evidence.layout.output).double() @ weight
    seen = evidence.seen.second_moment
    starts = torch.arange(evidence.layout.n_units, device=product.device) * width
    at = starts[:, None] + torch.arange(width, device=product.device)
    blocks = at[:, :, None], at[:, None, :]
    return (product[blocks] * seen[blocks]).sum((1, 2)) / 2


def kfac_obs(evidence: Evidence) -> Float[Tensor, " units"]:
    """Place in the order of greedy removal with updates by the curvature, as a share of the units.

    Optimal brain surgery as `obs`, but what is missing from the output is weighed by B, see `kfac`: the removal of S
    costs ``tr(B W_S (A^-1_SS)^-1 W_S^T)``, as The LLM Surgeon's columns do (van der Ouderaa et al. 2024, arXiv
    2312.17244, eq. 9), one at a time. The update of the kept columns is that of `obs`: it does not depend on B.
    """
    layout = evidence.layout
    moment = dampened(evidence.gradient("fisher_outputs", layout.output).double(), RIDGE)
    order = obs_order(
        factor(moment, layout.output.name).T @ evidence.weight.double(),
        evidence.seen.second_moment,
        layout.unit_width,
        dampening=evidence.dampening,
        name=layout.output.name,
    )
    return places(order)
