"""Candidates of the space `architecture`: numbers of KV groups, query heads and FFN channels of each block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from secateur.spaces.methods import UNIT_REPAIRS


class Kept(NamedTuple):
    """Numbers of kept units of a block; 0: the sub-layer is removed, with its norm.

    Args:
        kv_groups: KV heads, each with the query heads that read it.
        ffn: channels of the MLP, or routed experts of a mixture.
        queries: query heads of each kept group; 0: all of them.
        channels: of each routed expert of a mixture; 0: all of them.
        shared: channels of the shared experts of a mixture; 0: all of them.
    """

    kv_groups: int
    ffn: int
    queries: int = 0
    channels: int = 0
    shared: int = 0

    @property
    def units(self) -> tuple[int, int]:
        """KV groups and channels (or experts)."""
        return self.kv_groups, self.ffn

    @property
    def plain(self) -> dict[str, int]:
        """``{"kv_groups": 3, "ffn": 1536}``, and ``"queries": 2`` and the like where those are cut."""
        plain = {"kv_groups": self.kv_groups, "ffn": self.ffn}
        further = {"queries": self.queries, "channels": self.channels, "shared": self.shared}
        return plain | {name: n for name, n in further.items() if n}


_RUN = re.compile(
    r"(?P<kv_groups>\d{1,6})(?:q(?P<queries>\d{1,6}))?/(?P<ffn>\d{1,6})(?:c(?P<channels>\d{1,6}))?"
    r"(?:s(?P<shared>\d{1,6}))?(?:x(?P<times>\d{1,6}))?",
    re.ASCII,
)
"""Blocks of one shape in a text."""

GONE = Kept(0, 0)
MAX_BLOCKS = 10_000
"""Most blocks that a text may list."""


@dataclass(frozen=True)
class KeptUnits:
    """Kept units of one block, by their indices in the dense model, in their present order.

    Args:
        kv_groups: key/value heads.
        channels: of the MLP, or routed experts of a mixture.
        queries: query heads, group by group; empty where all of each kept group stay.
    """

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]
    queries: tuple[int, ...] = ()


def read_kept(config: Mapping[str, Any]) -> tuple[Kept, ...]:
    """The blocks of a plain configuration, ``{"blocks": [{"kv_groups": 3, "ffn": 1536}, ...]}``, see `Kept.plain`."""
    return tuple(
        Kept(block["kv_groups"], block["ffn"], *(block.get(name, 0) for name in Kept._fields[2:]))
        for block in config["blocks"]
    )


@dataclass(frozen=True)
class Architecture:
    """Kept units of each block, and the repair if it is searched too.

    Its text lists the blocks in order, equal neighbours as ``<kept>x<times>``:
    ``architecture:3/1536x5,0/1024,3/1536``, followed by ``;repair=refit`` if there are several repairs. ``3q2``: 2
    query heads of each of 3 KV groups; ``6c24s32``: 24 channels of each of 6 routed experts, and 32 of the shared ones.
    ``;hidden=512`` before the repair: hidden channels of the whole model.

    Args:
        blocks: one entry a block.
        repair: compensation for removed weights; "" if the space has only one repair.
        hidden: hidden channels; 0: all.
    """

    blocks: tuple[Kept, ...]
    repair: str = ""
    hidden: int = 0

    @cached_property
    def text(self) -> str:
        runs = [(kept, len(list(group))) for kept, group in groupby(self.blocks)]
        body = ",".join(_text(kept) + (f"x{n}" if n > 1 else "") for kept, n in runs)
        hidden = f";hidden={self.hidden}" if self.hidden else ""
        return f"architecture:{body}{hidden}" + (f";repair={self.repair}" if self.repair else "")

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """The architecture with this canonical text.

        Raises:
            ValueError: if it is not the text of an architecture.
        """
        form = r"architecture:([\d/xqcs,]+)(?:;hidden=(\d{1,6}))?(?:;repair=(\S+))?"
        whole = re.fullmatch(form, text, re.ASCII)
        runs = whole[1].split(",") if whole else []
        found = [_RUN.fullmatch(run) for run in runs]
        n_blocks = sum(int(x["times"] or 1) for x in found if x)
        few = n_blocks <= MAX_BLOCKS
        kept = [
            (Kept(*(int(x[name] or 0) for name in Kept._fields)), int(x["times"] or 1))
            for x in found
            if x and few
        ]
        blocks = [each for each, times in kept for _ in range(times)]
        repair = (whole and whole[3]) or ""
        architecture = cls(tuple(blocks), repair, int((whole and whole[2]) or 0))
        if whole and architecture.text == text and repair in ("", *UNIT_REPAIRS):
            return architecture
        raise ValueError(
            f"Expected an architecture such as 'architecture:3/1536x5,0/1024', got {text[:80]!r}."
        )


def _text(kept: Kept) -> str:
    groups = f"{kept.kv_groups}q{kept.queries}" if kept.queries else f"{kept.kv_groups}"
    channels = f"c{kept.channels}" if kept.channels else ""
    return f"{groups}/{kept.ffn}{channels}" + (f"s{kept.shared}" if kept.shared else "")
