"""Candidates of the space `architecture`: numbers of KV groups and FFN channels of each block."""

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
    """

    kv_groups: int
    ffn: int


GONE = Kept(0, 0)
MAX_BLOCKS = 10_000
"""Most blocks that a text may list."""


@dataclass(frozen=True)
class KeptUnits:
    """Kept units of one block, by their indices in the dense model, in their present order.

    Args:
        kv_groups: key/value heads.
        channels: of the MLP, or routed experts of a mixture.
    """

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]


def read_kept(config: Mapping[str, Any]) -> tuple[Kept, ...]:
    """The blocks of a plain configuration, ``{"blocks": [{"kv_groups": 3, "ffn": 1536}, ...]}``."""
    return tuple(Kept(block["kv_groups"], block["ffn"]) for block in config["blocks"])


@dataclass(frozen=True)
class Architecture:
    """Kept units of each block, and the repair if it is searched too.

    Its text lists the blocks in order, equal neighbours as ``<kept>x<times>``:
    ``architecture:3/1536x5,0/1024,3/1536``, followed by ``;repair=refit`` if there are several repairs.

    Args:
        blocks: one entry a block.
        repair: compensation for removed weights; "" if the space has only one repair.
    """

    blocks: tuple[Kept, ...]
    repair: str = ""

    @cached_property
    def text(self) -> str:
        runs = [(kept, len(list(group))) for kept, group in groupby(self.blocks)]
        body = ",".join(f"{g}/{w}" + (f"x{n}" if n > 1 else "") for (g, w), n in runs)
        return f"architecture:{body}" + (f";repair={self.repair}" if self.repair else "")

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """The architecture with this canonical text.

        Raises:
            ValueError: if it is not the text of an architecture.
        """
        whole = re.fullmatch(r"architecture:([\d/x,]+)(?:;repair=(\S+))?", text, re.ASCII)
        runs = whole[1].split(",") if whole else []
        found = [re.fullmatch(r"(\d{1,6})/(\d{1,6})(?:x(\d{1,6}))?", run) for run in runs]
        n_blocks = sum(int(x[3] or 1) for x in found if x)
        few = n_blocks <= MAX_BLOCKS
        blocks = [Kept(int(x[1]), int(x[2])) for x in found if x and few for _ in range(int(x[3] or 1))]
        repair = (whole and whole[2]) or ""
        architecture = cls(tuple(blocks), repair)
        if whole and architecture.text == text and repair in ("", *UNIT_REPAIRS):
            return architecture
        raise ValueError(
            f"Expected an architecture such as 'architecture:3/1536x5,0/1024', got {text[:80]!r}."
        )
