"""Work of the jobs of a search: blocks that are computed, and those that candidates share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.evaluators.blockwise import prefix_bytes
from secateur.evaluators.data.windows import batch_ends, batch_tokens
from secateur.evaluators.prefix_tree import Path, walk
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.pruners.stores.recent import Recent
from secateur.spaces.measurement import Fidelity


@dataclass(frozen=True)
class _State:
    """Output of a block on a batch, as far as the cache looks at it."""

    nbytes: int


@dataclass
class Blocks:
    """Work of some jobs.

    Args:
        block_tokens: tokens that go through each block, summed over candidates.
        head_tokens: tokens that go to the head.
        switches: of blocks to other weights.
        state_bytes: of all outputs of blocks.
    """

    block_tokens: Counter[int]
    head_tokens: int = 0
    switches: int = 0
    state_bytes: int = 0


def shared_work(
    jobs: Sequence[tuple[Fidelity, Sequence[Any]]],
    pruner: Pruner,
    window: int,
    fidelities: Sequence[Fidelity],
    element_bytes: int,
) -> Blocks:
    """Work of jobs that one worker measures in turn, blocks that candidates share computed once.

    As `BlockwiseEvaluator` does, whose cache of outputs is used here without tensors. Where the keys of a candidate are
    not known before it is scored, nothing counts as shared.

    Args:
        jobs: candidates by fidelity, in order.
        pruner: of the space, on a model without memory.
        window: tokens of a window.
        fidelities: of the search; batches end at each.
        element_bytes: of a hidden state's element.
    """
    n_blocks, width = len(pruner.anatomy.blocks), pruner.anatomy.width
    sizes = [x.n_tokens for x in fidelities if x.part == "search"]
    ends = batch_ends(window, sizes, batch_tokens(pruner.anatomy))
    cache, done, found = (
        Recent[_State](prefix_bytes(pruner.anatomy)),
        set[tuple[int, Path]](),
        Blocks(Counter()),
    )
    for number, (fidelity, candidates) in enumerate(jobs):
        if fidelity.part != "search":  # a closed form, or passes of its own
            n_tokens = len(candidates) * fidelity.total_tokens
            found.head_tokens += n_tokens
            found.block_tokens.update(dict.fromkeys(range(n_blocks), n_tokens))
            continue
        paths = [_path(pruner, x, (number, i), n_blocks) for i, x in enumerate(candidates)]
        for start, stop in pairwise([0, *ends]):
            if start * window >= fidelity.n_tokens:
                break
            n_tokens = (stop - start) * window
            new = list(dict.fromkeys(path for path in paths if (stop, path) not in done))
            done |= {(stop, path) for path in new}
            sharing = Counter(path[: depth + 1] for path in new for depth in range(n_blocks))

            def step(
                path: Path,
                member: int,
                state: _State,
                *,
                n_tokens: int = n_tokens,
                stop: int = stop,
                n_new: int = len(new),
                sharing: Counter[Path] = sharing,
            ) -> _State:
                def compute() -> _State:
                    found.block_tokens[len(path) - 1] += n_tokens
                    found.switches += 1
                    found.state_bytes += n_tokens * width * element_bytes
                    return _State(n_tokens * width * element_bytes)

                return cache.get((stop, path), compute, first_to_go=n_new > 1 == sharing[path])

            found.head_tokens += n_tokens * sum(1 for _ in walk(new, _State(0), step)) if new else 0
    return found


def _path(pruner: Pruner, candidate: Any, place: tuple[int, int], n_blocks: int) -> Path:
    """Keys of the blocks; those of nobody else where they are not known."""
    if pruner.keys_of_configs:
        try:
            return tuple(pruner.keys(pruner.space.config(candidate)))
        except InfeasibleError:
            pass
    return tuple((place, block) for block in range(n_blocks))
