"""Prefix tree of candidates: the first blocks that several have in common are computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

State = TypeVar("State")
Path = tuple[Hashable, ...]
"""The keys of the first blocks."""


def walk(
    paths: Sequence[Sequence[Hashable]],
    root: State,
    step: Callable[[Path, int, State], State],
) -> Iterator[tuple[tuple[int, ...], State]]:
    """Carry a state down the prefix tree, depth first, computing each node once.

    At most one state for each branching depth is alive at a time.

    Args:
        paths: for each member one key a block; all of one length.
        root: state above the first block.
        step: (keys down to and with this block, first member that needs it, state above) -> state below.

    Yields:
        For each distinct path its members (indices into `paths`) and its final state.
    """

    def below(members: list[int], prefix: Path, state: State) -> Iterator[tuple[tuple[int, ...], State]]:
        # Runs without branches are walked in this frame: its older states are freed at once.
        while len(prefix) < len(paths[members[0]]):
            groups: dict[Hashable, list[int]] = {}
            for member in members:
                groups.setdefault(paths[member][len(prefix)], []).append(member)
            if len(groups) > 1:
                for key, group in groups.items():
                    longer = (*prefix, key)
                    yield from below(group, longer, step(longer, group[0], state))
                return
            prefix = (*prefix, next(iter(groups)))
            state = step(prefix, members[0], state)
        yield tuple(members), state

    yield from below(list(range(len(paths))), (), root)
