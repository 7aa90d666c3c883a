"""The Python language reference that CPython carries (`pydoc_data.topics`): text that needs no download.

About 380,000 characters. Its topics repeat each other: "specialnames" holds all of "customization" and
"compound" all of "try". So a paragraph is kept in one topic only, the shortest that has it; otherwise much of
a test part would be a copy of the calibration part. The text depends on the version of Python (a
text's hash tells), not on the platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import TypeVar

Key = TypeVar("Key", bound=str)

_REPEATED = 40  # least characters of a paragraph that counts; shorter ones are headings and "Example:"


@cache
def topics() -> Mapping[str, str]:
    """The topics by name, in alphabetical order, without the paragraphs that a shorter topic has, too.

    Raises:
        ModuleNotFoundError: if this Python comes without `pydoc_data`.
    """
    from pydoc_data.topics import topics as raw

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(raw, key=lambda name: (len(raw[name]), name)):
        paragraphs = [p for p in raw[name].split("\n\n") if p.strip() and _key(p) not in seen]
        seen.update(_key(p) for p in paragraphs if len(_key(p)) >= _REPEATED)
        kept[name] = "\n\n".join(paragraphs)
    return MappingProxyType({name: kept[name] for name in sorted(kept) if kept[name].strip()})


def split(shares: Mapping[Key, float]) -> dict[Key, str]:
    """The text of each part: whole topics, so that the parts have no paragraph in common.

    The topics come in the order of the SHA-256 of their names; each goes to the part that is furthest below
    its share, so that the shares are met to a few percent.

    Args:
        shares: parts and their shares of the characters, > 0.
    """
    parts: dict[Key, list[str]] = {part: [] for part in shares}
    sizes = dict.fromkeys(shares, 0)
    texts = topics()
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        part = min(shares, key=lambda part: sizes[part] / shares[part])  # ties: the first part
        parts[part].append(texts[name])
        sizes[part] += len(texts[name])
    return {part: "\n\n\n".join(pieces) for part, pieces in parts.items()}


def _key(paragraph: str) -> str:
    """A paragraph without its indentation and line breaks, in which the copies differ."""
    return " ".join(paragraph.split())
