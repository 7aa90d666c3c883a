"""One walk over the dense model that finds all that is known of its activations: a block as named tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.output_statistics import ROLES, OutputCollector, OutputStatistics, influence
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.calibration.stream import InputCollector, Walk
from secateur.pruners.models.anatomy import Anatomy, Block

_OWNERS, _INFLUENCE = "owners", "influence"
_OF_OUTPUTS = ("total", "total_abs", "sum_squares", "window_squares")


@torch.no_grad()
def walk_dense(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, gram: bool
) -> Iterator[dict[str, Tensor]]:
    """Of each block what `inputs_of`, `outputs_of` and `influence_of` read; on the CPU, no two share memory.

    What of it is not a Gram matrix does not depend on whether these are collected.

    Memory beyond the model: the hidden states of the calibration tokens and one block's statistics.

    Args:
        anatomy: the dense model.
        tokens: calibration windows.
        gram: collect Gram matrices, too.
    """
    walk = Walk(anatomy, tokens)
    for block in anatomy.blocks:
        inputs, outputs = InputCollector(gram=False), OutputCollector(tokens.shape[1], gram=False)
        grams = InputCollector(gram=True)
        watch = [inputs.hook, outputs.hook, grams.hook]
        hidden = walk.through(block, watch if gram else watch[:2])
        piece = _of_inputs(block, inputs.of(block)) | _of_outputs(outputs.found)
        for name in _owners(inputs.of(block)) if gram else ():
            matrix = grams.of(block)[name].gram
            assert matrix is not None
            piece[f"gram.{name}"] = matrix
        piece[_INFLUENCE] = torch.tensor(influence(walk.hidden, hidden), dtype=torch.float64)
        yield {name: tensor.contiguous().cpu() for name, tensor in piece.items()}
        walk.hidden = hidden


def gram_bytes(anatomy: Anatomy) -> int:
    """Of all Gram matrices: those of what a sub-layer reads, and of what its output projection reads."""
    sizes = {(x.block, x.sublayer, x.role in ROLES): x.in_features for x in anatomy.linears}
    return sum(4 * size**2 for size in sizes.values())


def inputs_of(
    piece: Mapping[str, Tensor], block: Block, n_tokens: int, *, gram: bool
) -> dict[str, InputStatistics]:
    """Of each projection by its full name, on its device; those that read the same input share one object.

    Args:
        piece: the block's.
        block: of the live model.
        n_tokens: calibration tokens in all.
        gram: with Gram matrices; else the diagonal's own sums.
    """
    found: dict[str, InputStatistics] = {}
    for linear, index in zip(block.linears, piece[_OWNERS].tolist(), strict=True):
        owner = block.linears[index].name
        if owner not in found:
            device = linear.weight.device
            matrix = piece[f"gram.{owner}"].to(device) if gram else None
            squares = piece[f"inputs.sum_squares.{owner}"].to(device) if matrix is None else matrix.diagonal()
            found[owner] = InputStatistics(
                n_tokens, squares, matrix, piece[f"inputs.total.{owner}"].to(device)
            )
        found[linear.name] = found[owner]
    return found


def outputs_of(
    piece: Mapping[str, Tensor], block: Block, n_tokens: int, *, gram: bool
) -> dict[str, OutputStatistics]:
    """Of each output projection; see `inputs_of`."""
    found: dict[str, OutputStatistics] = {}
    for linear, index in zip(block.linears, piece[_OWNERS].tolist(), strict=True):
        if linear.role in ROLES:
            device = linear.weight.device
            moments = {field: piece[f"outputs.{field}.{linear.name}"].to(device) for field in _OF_OUTPUTS}
            matrix = piece[f"gram.{block.linears[index].name}"].to(device) if gram else None
            found[linear.name] = OutputStatistics(n_tokens=n_tokens, gram=matrix, **moments)
    return found


def influence_of(piece: Mapping[str, Tensor]) -> float:
    """See `BlockOutputs`."""
    return float(piece[_INFLUENCE])


def _of_inputs(block: Block, found: Mapping[str, InputStatistics]) -> dict[str, Tensor]:
    """Shared ones once, and for each projection whose it shares, by its place in the block."""
    owners = _owners(found)
    first = {
        id(found[name]): index for index, name in enumerate(x.name for x in block.linears) if name in owners
    }
    piece = {_OWNERS: torch.tensor([first[id(found[x.name])] for x in block.linears])}
    for name in owners:
        total = found[name].total
        assert total is not None
        piece |= {f"inputs.total.{name}": total, f"inputs.sum_squares.{name}": found[name].sum_squares}
    return piece


def _owners(found: Mapping[str, InputStatistics]) -> list[str]:
    """The first projection of each input."""
    first: dict[int, str] = {}
    for name, statistics in found.items():
        first.setdefault(id(statistics), name)
    return list(first.values())


def _of_outputs(found: Mapping[str, OutputStatistics]) -> dict[str, Tensor]:
    return {
        f"outputs.{field}.{name}": getattr(statistics, field)
        for name, statistics in found.items()
        for field in _OF_OUTPUTS
    }
