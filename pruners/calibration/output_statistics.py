"""Stream a model block by block and collect what the output projections of attention and MLP see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from secateur.pruners.calibration.stream import Hook, Walk
from secateur.pruners.models.anatomy import Anatomy, Block, Linear

ROLES = ("o", "down")


@dataclass
class OutputStatistics:
    """Running moments of the inputs of an output projection; sums over batches in fp64, the Gram matrix in fp32.

    Args:
        n_tokens: calibration tokens seen.
        total: sum over tokens of the input, per feature.
        total_abs: sum over tokens of its absolute value.
        sum_squares: sum over tokens of its square.
        window_squares: sum over windows of the squared mean over the window's tokens of its absolute value.
        gram: sum over tokens of the outer product of the input with itself, or None if not collected.
    """

    n_tokens: int
    total: Float[Tensor, " in"]
    total_abs: Float[Tensor, " in"]
    sum_squares: Float[Tensor, " in"]
    window_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None

    @classmethod
    def empty(cls, n_features: int, *, gram: bool, device: torch.device) -> OutputStatistics:
        """Nothing seen yet."""
        matrix = torch.zeros(n_features, n_features, device=device) if gram else None
        total, total_abs, squares, windows = torch.zeros(4, n_features, dtype=torch.float64, device=device)
        return cls(0, total, total_abs, squares, windows, matrix)

    def add(self, inputs: Float[Tensor, "windows length in"]) -> None:
        """Add whole windows."""
        inputs = inputs.float()
        rows = inputs.flatten(0, 1)
        self.n_tokens += rows.shape[0]
        self.total += rows.sum(0)
        self.sum_squares += rows.square().sum(0)
        absolute = inputs.abs().mean(1)
        self.total_abs += absolute.sum(0) * inputs.shape[1]
        self.window_squares += absolute.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(rows.T, rows)

    @property
    def mean(self) -> Float[Tensor, " in"]:
        return self.total / max(self.n_tokens, 1)

    @property
    def mean_abs(self) -> Float[Tensor, " in"]:
        return self.total_abs / max(self.n_tokens, 1)

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """Over the tokens."""
        return (self.sum_squares / max(self.n_tokens, 1) - self.mean.square()).clamp_min(0.0)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """Root mean square."""
        return (self.sum_squares / max(self.n_tokens, 1)).sqrt()

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """The Gram matrix a token, in fp64."""
        assert self.gram is not None, "the caller collects what the registries say that is needed"
        return self.gram.double() / max(self.n_tokens, 1)


@dataclass(frozen=True)
class BlockOutputs:
    """A block with what was seen of it; nothing if nothing is needed.

    Args:
        block: the block.
        inputs: statistics of its output projections, by the projection's full name.
        influence: mean over tokens of one minus the cosine between its input and its output (ShortGPT's block
            influence, Men et al. 2024, arXiv 2403.03853, eq. 1).
    """

    block: Block
    inputs: dict[str, OutputStatistics] = field(default_factory=dict)
    influence: float = 0.0


@torch.no_grad()
def stream_outputs(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, gram: bool, sequential: bool
) -> Iterator[BlockOutputs]:
    """Yield each block with its statistics; the consumer may cut the block before it asks for the next.

    Memory beyond the model: the hidden states of the calibration tokens and one block's statistics.

    Args:
        anatomy: the model.
        tokens: calibration windows.
        gram: collect Gram matrices.
        sequential: compute a block's output after the consumer had it, so that later statistics come from
            already cut blocks. Otherwise all statistics are those of the model as it was, whatever the consumer
            does to the block.
    """
    walk = Walk(anatomy, tokens)
    for block in anatomy.blocks:
        collector = OutputCollector(tokens.shape[1], gram=gram)
        outputs = walk.through(block, [collector.hook])
        yield BlockOutputs(block, collector.found, influence(walk.hidden, outputs))
        walk.hidden = walk.through(block) if sequential else outputs


def influence(
    before: list[Float[Tensor, "batch length width"]], after: list[Float[Tensor, "batch length width"]]
) -> float:
    """See `BlockOutputs`."""
    turned = [
        1 - cosine_similarity(x.double(), y.double(), dim=-1) for x, y in zip(before, after, strict=True)
    ]
    return float(torch.cat(turned).mean())


class OutputCollector:
    """Adds up the inputs of output projections.

    Args:
        length: tokens of a window.
        gram: collect Gram matrices.
    """

    def __init__(self, length: int, *, gram: bool) -> None:
        self._length = length
        self._gram = gram
        self.found: dict[str, OutputStatistics] = {}

    def hook(self, linear: Linear) -> Hook | None:
        """See `HookOf`."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            name, inputs = linear.name, args[0]
            if name not in self.found:
                self.found[name] = OutputStatistics.empty(
                    inputs.shape[-1], gram=self._gram, device=inputs.device
                )
            # OPT's have lost their windows.
            self.found[name].add(inputs.reshape(-1, self._length, inputs.shape[-1]))

        return add if linear.role in ROLES else None
