"""SparseLLM: gate, up and down pruned together, by alternation over the activations between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.statistics import Collector, InputRecorder, InputStatistics
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.linalg import input_factor, least_squares, stored_in
from secateur.pruners.masks import check_sparsity
from secateur.pruners.models.anatomy import Anatomy, Block, Linear, Role
from secateur.pruners.models.memory import check_memory
from secateur.pruners.weights.method import LayerProblem
from secateur.pruners.weights.sparsegpt import sparsegpt

N_STEPS = 8  # alternations, the released number for Llama
N_GATE_STEPS = 2  # steps on the gate's outputs in each of them, likewise

Activation = Callable[[Tensor], Tensor]
Weights = dict[str, Float[Tensor, "out in"]]
"""By the projection's full name."""


@torch.no_grad()
def sparsellm(
    anatomy: Anatomy,
    block: Block,
    tokens: Int[Tensor, "windows length"],
    states: Float[Tensor, "windows length width"],
    sparsity: Mapping[str, float],
    *,
    dampening: float = 0.01,
) -> Weights:
    """Pruned and updated weights of a block; the block itself is unchanged.

    Bai et al. 2024 (arXiv 2402.17946). With X and Y the MLP's dense inputs and outputs, and auxiliary variables s, z
    and p for the outputs of gate and up and the input of down, an MLP minimises
    ``||Y - W_d p||^2 + ||p - act(s) z||^2 + ||s - W_g X||^2 + ||z - W_u X||^2`` by turns: each W is the fit by least
    squares, pruned by SparseGPT; then p and z are set to their optima in closed form, and s takes two steps downhill.
    The terms weigh the same, as in the released code. Attention is pruned by SparseGPT alone.

    Differences: all statistics are the dense model's, in fp32. A step on s is Gauss-Newton's: the released steps, of
    a fixed length, diverge where activations are large. A tiny ridge stands for the pseudo-inverse.

    Args:
        anatomy: the model, of a family whose MLPs are gated, in three projections.
        block: dense; the others need not be.
        tokens: calibration windows.
        states: the dense model's hidden states before the block, see `stream.stream_states`.
        sparsity: in [0, 1], by the projection's full name; one without an entry is not pruned, though fitted anew
            beside one of the same MLP that is.
        dampening: of SparseGPT.

    Returns:
        Weights of the block's projections, without dense ones.

    Raises:
        ValueError: on a name that the model does not have, a sparsity out of range, as `check_gated` does, or inputs
            that are not finite.
    """
    check_sparsity(anatomy, sparsity)
    check_gated(anatomy, block, tokens)
    walk, seen = Walk(anatomy, tokens), InputRecorder("gate", "down")
    inputs = Collector(InputStatistics, tokens.shape[1], gram=True)
    walk.hidden = list(states.split([len(batch) for batch in walk.hidden]))
    walk.through(block, [inputs.hook, seen.hook])
    found: Weights = {}
    for linear in block.linears:
        if linear.sublayer == "attention" and sparsity.get(linear.name):
            statistics = inputs.of(block)[linear.name]
            found[linear.name] = _pruned(linear, linear.weight, statistics, sparsity, dampening)
    if any(sparsity.get(linear.name) for linear in block.linears if linear.sublayer == "mlp"):
        linears = {linear.role: linear for linear in block.linears}
        x, p = seen.of("gate"), seen.of("down")
        found |= _mlp(linears, _activation(anatomy, linears, x, p), x, p, sparsity, dampening)
    return found


def check_gated(anatomy: Anatomy, block: Block, tokens: Int[Tensor, "windows length"]) -> None:
    """Raise a ValueError if the block has another kind of MLP, or there is too little memory."""
    roles = [linear.role for linear in block.linears if linear.sublayer == "mlp"]
    if {*roles} != {"gate", "up", "down"}:
        raise ValueError(
            f"Expected an MLP of the projections gate, up and down for sparsellm, got {', '.join(roles)} at "
            f"{block.name}. Use the metric sparsegpt."
        )
    check_memory(
        4 * tokens.numel() * (8 * block.ffn_width + 3 * anatomy.width) + 24 * block.ffn_width**2,
        anatomy.embedding.weight.device,
        f"SparseLLM on {tokens.numel():,} calibration tokens",
        "Use fewer tokens, or the metric sparsegpt.",
    )


def _activation(
    anatomy: Anatomy,
    linears: Mapping[Role, Linear],
    x: Float[Tensor, "tokens width"],
    p: Float[Tensor, "tokens ffn"],
) -> Activation:
    """Module of a gated MLP from the gate's outputs to the factors of up's, found by the inputs p of down."""
    s, z = (_outputs(linears[role], linears[role].weight.float(), x[:16]) for role in ("gate", "up"))
    owner = anatomy.model.get_submodule(linears["gate"].name.rpartition(".")[0])
    for module in owner.children():
        plain = not [*module.parameters()] and not isinstance(module, nn.Dropout)
        if plain and torch.allclose(module(s) * z, p[:16], rtol=0.05, atol=0.01 * float(p[:16].abs().max())):
            return module
    raise ValueError(
        f"Expected the activation of a gated MLP among the modules of {anatomy.blocks[linears['gate'].block].name}, "
        "got none that gives the inputs of its down projection. Use the metric sparsegpt."
    )


def _mlp(
    linears: Mapping[Role, Linear],
    act: Activation,
    x: Float[Tensor, "tokens width"],
    p: Float[Tensor, "tokens ffn"],
    sparsity: Mapping[str, float],
    dampening: float,
) -> Weights:
    """Last pruned weights of the alternation over weights and auxiliary variables, which begins at dense x and p."""
    gate, up, down = (linears[role] for role in ("gate", "up", "down"))
    y = p @ down.weight.float().T
    of_x, of_p, lower = _statistics(x), _statistics(p), input_factor(x, gate.name)
    w_gate, w_up, w_down = (linear.weight.float() for linear in (gate, up, down))
    s, z = _outputs(gate, w_gate, x), _outputs(up, w_up, x)
    for step in range(N_STEPS):
        if step:
            w_gate = least_squares(x, s - _bias(gate), lower).float()
            w_up = least_squares(x, z - _bias(up), lower).float()
            w_down = least_squares(p, y, input_factor(p, down.name)).float()
        w_gate = _pruned(gate, w_gate, of_x, sparsity, dampening)
        w_up = _pruned(up, w_up, of_x, sparsity, dampening)
        w_down = _pruned(down, w_down, of_p, sparsity, dampening)
        p = best_products(y, w_down, act(s) * z)
        z = best_outputs(_outputs(up, w_up, x), act(s), p)
        s = nearer_gates(_outputs(gate, w_gate, x), s, z, p, act)
        of_p = _statistics(p)
    found = {gate: w_gate, up: w_up, down: w_down}
    return {linear.name: stored_in(weight, linear.weight.dtype) for linear, weight in found.items()}


def best_products(
    y: Float[Tensor, "tokens width"], down: Float[Tensor, "width ffn"], products: Float[Tensor, "tokens ffn"]
) -> Float[Tensor, "tokens ffn"]:
    """The p of least ``||y - W_d p||^2 + ||p - products||^2``."""
    square = down.T @ down
    square.diagonal().add_(1.0)
    return torch.cholesky_solve((y @ down + products).T, torch.linalg.cholesky(square)).T


def best_outputs(
    ups: Float[Tensor, "tokens ffn"], gates: Float[Tensor, "tokens ffn"], p: Float[Tensor, "tokens ffn"]
) -> Float[Tensor, "tokens ffn"]:
    """The z of least ``||p - gates z||^2 + ||z - ups||^2``."""
    return (ups + gates * p) / (gates.square() + 1)


def nearer_gates(
    outputs: Float[Tensor, "tokens ffn"],
    s: Float[Tensor, "tokens ffn"],
    z: Float[Tensor, "tokens ffn"],
    p: Float[Tensor, "tokens ffn"],
    act: Activation,
) -> Float[Tensor, "tokens ffn"]:
    """Some steps from s towards the least ``||p - act(s) z||^2 + ||s - outputs||^2``."""
    for _ in range(N_GATE_STEPS):
        gates, slope = _with_slope(act, s)
        slope = slope * z
        s = s - (s - outputs + slope * (gates * z - p)) / (1 + slope.square())
    return s


@torch.enable_grad()
def _with_slope(act: Activation, s: Tensor) -> tuple[Tensor, Tensor]:
    """Values of an elementwise function, and its derivative there."""
    s = s.detach().requires_grad_(True)
    values = act(s)
    (slope,) = torch.autograd.grad(values.sum(), s)
    return values.detach(), slope


def _pruned(
    linear: Linear,
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics,
    sparsity: Mapping[str, float],
    dampening: float,
) -> Float[Tensor, "out in"]:
    layer = LayerProblem(weight, inputs, dampening=dampening, name=linear.name)
    return sparsegpt(layer, [sparsity.get(linear.name, 0.0)])[0]


def _statistics(rows: Float[Tensor, "tokens in"]) -> InputStatistics:
    found = InputStatistics.empty(rows.shape[1], gram=True, device=rows.device)
    found.add(rows)
    return found


def _outputs(
    linear: Linear, weight: Float[Tensor, "out in"], rows: Float[Tensor, "tokens in"]
) -> Float[Tensor, "tokens out"]:
    return rows @ weight.T + _bias(linear)


def _bias(linear: Linear) -> Float[Tensor, " out"] | float:
    return 0.0 if linear.bias is None else linear.bias.float()
