"""Pictures as SVG within a page: drawn twice, for wide and for narrow screens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

Draw = Callable[..., None]
"""Function of a path, of the form SVG, and the keyword ``narrow``."""

_LINK = re.compile(r'<a xlink:href="(#[^"]*?(\d+))"')
_IDS = re.compile(
    r' id="(?:figure|patch|axes|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection)_\d+"'
)


@dataclass(frozen=True)
class Picture:
    """Picture of a page.

    Args:
        wide, narrow: elements ``<svg>``.
        text: what it shows, in words with numbers.
    """

    wide: Markup
    narrow: Markup
    text: str


def picture(
    name: str, text: str, draw: Draw, *args: Any, titles: Mapping[int, str] = MappingProxyType({}), **how: Any
) -> Picture:
    """Picture by a function that draws into a file.

    Args:
        name: unique in its page.
        text: what it shows, in words with numbers.
        draw: called as ``draw(path, *args, narrow=..., **how)``.
        titles: words for the links to trials, by number.
    """
    made = []
    with TemporaryDirectory() as directory:
        for narrow in (False, True):
            path = Path(directory) / f"{name}{'-narrow' * narrow}.svg"
            draw(path, *args, narrow=narrow, **how)
            made.append(_inline(path.read_text(encoding="utf-8"), text, titles))
    return Picture(made[0], made[1], text)


def _inline(svg: str, text: str, titles: Mapping[int, str]) -> Markup:
    """The element of a file by matplotlib, without what only files need; links get titles, shown by the pointer."""
    body = _IDS.sub("", svg[svg.index(">", svg.index("<svg ")) + 1 :])
    body = re.sub(
        r"<metadata>.*?</metadata>|<style .*?</style>", "", body, flags=re.DOTALL
    )  # it would hold for the page
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib writes one

    def named(found: re.Match[str]) -> str:
        title = escape(titles.get(int(found[2]), f"Trial {found[2]}"))
        return f'<a href="{found[1]}" class="hit" data-trial="{found[2]}" aria-label="{title}"><title>{title}</title'

    body = _LINK.sub(named, body)
    # matplotlib escapes all text that it is given
    return Markup(f'<svg {box[0]} role="group" aria-label="{escape(text)}">{body}')
