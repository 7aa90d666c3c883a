"""Shared prefixes: candidates that agree on the first blocks have those blocks computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class SharedWork:
    """Blocks computed and saved for each member of a batch, in one pass over its data.

    A block that several members share is counted for the first of them.
    """

    computed: tuple[int, ...]
    saved: tuple[int, ...]


def shared_work(paths: Sequence[Sequence[Hashable]]) -> SharedWork:
    """Count the nodes of the prefix tree of these paths.

    Args:
        paths: for each member one key a block; all of one length.
    """
    seen: set[tuple[Hashable, ...]] = set()
    computed = []
    for path in paths:
        prefixes = {tuple(path[: depth + 1]) for depth in range(len(path))}
        computed.append(len(prefixes - seen))
        seen |= prefixes
    saved = tuple(len(path) - new for path, new in zip(paths, computed, strict=True))
    return SharedWork(tuple(computed), saved)


def walk(
    paths: Sequence[Sequence[Hashable]],
    root: State,
    step: Callable[[int, Hashable, State], State],
) -> Iterator[tuple[tuple[int, ...], State]]:
    """Carry a state down the prefix tree, depth first, computing each node once.

    At most one state for each branching depth is alive at a time.

    Args:
        paths: for each member one key a block; all of one length.
        root: state above the first block.
        step: (block, key, state above) -> state below.

    Yields:
        For each distinct path its members (indices into `paths`) and its final state.
    """
    yield from _walk(paths, tuple(range(len(paths))), 0, root, step)


def _walk(
    paths: Sequence[Sequence[Hashable]],
    members: tuple[int, ...],
    depth: int,
    state: State,
    step: Callable[[int, Hashable, State], State],
) -> Iterator[tuple[tuple[int, ...], State]]:
    # Runs without branches are walked in this frame: its older states are let go at once.
    while depth < len(paths[members[0]]):
        groups: dict[Hashable, list[int]] = {}
        for member in members:
            groups.setdefault(paths[member][depth], []).append(member)
        if len(groups) > 1:
            for key, group in groups.items():
                yield from _walk(paths, tuple(group), depth + 1, step(depth, key, state), step)
            return
        state = step(depth, next(iter(groups)), state)
        depth += 1
    yield members, state
