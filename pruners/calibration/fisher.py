"""Fisher information of projections, Kronecker-factored: second moments of inputs and of the outputs' gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.backward import CHUNK_TOKENS, Add, backward_blocks, head_gradient
from secateur.pruners.linalg import dampened, factor
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.runner import BlockRunner, fp32_bytes, in_fp32

BATCH_TOKENS = 2048
FEW_TOKENS = 8192
"""Calibration tokens of the passes below, of evenly spread windows: the hidden states of all blocks are held."""

OUTPUT_DAMPENING = 0.1
"""Added to the diagonal of the gradients' second moment, as a fraction of its mean (The LLM Surgeon's)."""


def plus(total: Tensor | None, summand: Tensor) -> Tensor:
    """The total with one more summand, in place."""
    return summand if total is None else total.add_(summand)


class Moments:
    """Sums over tokens of the outer products of a projection's inputs, and of its outputs' gradients, in fp32."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None

    def add(self, linear: Linear, inputs: Tensor, gradients: Tensor) -> None:
        """Add a call of a projection; one that reads the same tensor as the call before shares its sum."""
        name = linear.name
        self.add_gradients(linear, inputs, gradients)
        same = self._last is not None and self._last[0].data_ptr() == inputs.data_ptr()
        if same and self._last is not None:
            self.inputs[name] = self.inputs[self._last[1]]
            return
        self._last = inputs, name
        x = inputs.float()
        self.inputs[name] = plus(self.inputs.get(name), x.T @ x)

    def add_gradients(self, linear: Linear, inputs: Tensor, gradients: Tensor) -> None:
        """Add a call's gradients alone."""
        g = gradients.float()
        self.gradients[linear.name] = plus(self.gradients.get(linear.name), g.T @ g)

    def clear(self) -> None:
        self.inputs.clear()
        self.gradients.clear()
        self._last = None


def walk_back(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    add: Add,
    *,
    watched: Collection[str],
    drawn: torch.Generator | None,
) -> Iterator[Block]:
    """Backward walk of the cross-entropy, a sum over tokens, see `backward_blocks`.

    Args:
        anatomy: the model, with the weights that it has now.
        tokens: windows.
        add: given each call of the watched projections, with the gradients of its outputs.
        watched: full names of projections.
        drawn: source of labels from the model's own distribution, for the true Fisher information; None: the labels of
            the text, for the empirical one.
    """
    parts = tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    batches = [BlockRunner(anatomy).start(part) for part in parts]

    def top(number: int, hidden: Tensor) -> Tensor:
        targets = torch.roll(parts[number], -1, dims=1).flatten()

        def residual(chunk: int, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
            found = logits.softmax(-1)
            if drawn is None:
                labels = targets[chunk * CHUNK_TOKENS :][: len(found), None]
            else:
                labels = torch.multinomial(found.cpu(), 1, generator=drawn)
            labels = labels.to(found.device)
            return found.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=found.dtype))

        gradient = head_gradient(anatomy, hidden, residual)
        gradient[:, : anatomy.first_scored] = 0  # what a BOS token predicts does not count
        if drawn is None:
            gradient[:, -1] = 0  # no token follows
        return gradient

    return backward_blocks(anatomy, batches, top, add, watched=watched)


@torch.no_grad()
def output_costs(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, seed: int = 0
) -> dict[str, Float[Tensor, " out"]]:
    """Curvature of the loss in each output of each projection, the other outputs free to follow: ``1 / [B^-1]_ii``.

    B is the second moment of the outputs' gradients for drawn labels (the true Fisher information), a token, dampened
    by `OUTPUT_DAMPENING`. One forward and one backward pass of the dense model over at most `FEW_TOKENS` tokens.

    Returns:
        By the projection's full name, in nats over squared outputs, in fp32 on the CPU.

    Raises:
        ValueError: if a gradient is not finite.
    """
    names = [linear.name for linear in anatomy.linears]
    return {name: _alone(moment, name) for name, moment in _output_moments(anatomy, tokens, names, seed)}


@torch.no_grad()
def output_moments(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    names: Collection[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Float[Tensor, "out out"]]:
    """B of projections by their full names, undampened; None: of the output projections of attention and MLP.

    See `output_costs`.
    """
    if names is None:
        names = [linear.name for linear in anatomy.linears if linear.is_output]
    return {name: moment.cpu() for name, moment in _output_moments(anatomy, tokens, names, seed)}


def pass_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of `output_costs` beyond the model, in bytes: states before all blocks, and the work of one."""
    states = (len(anatomy.blocks) + 1) * max(FEW_TOKENS, length) * anatomy.width
    batch = max(BATCH_TOKENS, length)
    heads = max(block.n_heads for block in anatomy.blocks)
    work, logits = 0, 3 * CHUNK_TOKENS * anatomy.vocab_size
    for block in anatomy.blocks:
        of_block = sum(2 * batch * x.out_features + 2 * x.out_features**2 for x in block.linears)
        work = max(work, of_block + 2 * batch * heads * length)
    return 4 * (states + work + logits) + fp32_bytes(anatomy.model)


def moments_bytes(anatomy: Anatomy, length: int) -> int:
    """Likewise of `output_moments`, with the results."""
    kept = sum(x.out_features**2 for x in anatomy.linears if x.is_output)
    return pass_bytes(anatomy, length) + 4 * kept


def _output_moments(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], names: Collection[str], seed: int
) -> Iterator[tuple[str, Float[Tensor, "out out"]]]:
    """B of projections, block by block from the last one; zeros of one that is never called, as an expert may be."""
    n_windows = min(len(tokens), max(1, FEW_TOKENS // tokens.shape[1]))
    some = tokens[torch.linspace(0, len(tokens) - 1, n_windows).round().long()]
    moments, generator = Moments(), torch.Generator(device="cpu").manual_seed(seed)
    with in_fp32(anatomy.model):
        walk = walk_back(anatomy, some, moments.add_gradients, watched=frozenset(names), drawn=generator)
        for block in walk:
            for linear in block.linears:
                if linear.name in names:
                    none = linear.weight.new_zeros(linear.out_features, linear.out_features)
                    yield linear.name, moments.gradients.get(linear.name, none).float() / some.numel()
            moments.clear()


def _alone(moment: Float[Tensor, "out out"], name: str) -> Float[Tensor, " out"]:
    inverse = torch.cholesky_inverse(factor(dampened(moment, OUTPUT_DAMPENING).double(), name))
    return inverse.diagonal().reciprocal().float().cpu()
