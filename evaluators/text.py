"""Text for calibration, search and test: where it comes from, and three parts of it that never overlap.

A source that several parts name without a range is cut for them into contiguous pieces by `SHARES`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from secateur.evaluators import docs
from secateur.evaluators.sources import DOCS, Source, Span, TextError, parse

__all__ = ["SHARES", "Part", "Text", "TextError", "load_parts", "load_text"]

Part = Literal["calibration", "search", "test"]
SHARES: Mapping[Part, float] = MappingProxyType({"calibration": 0.3, "search": 0.4, "test": 0.3})


@dataclass(frozen=True)
class Text:
    """The text of one part.

    Args:
        part: ``calibration``, ``search`` or ``test``.
        source: where it comes from, as in the settings.
        text: the text, not empty.
    """

    part: Part
    source: str
    text: str

    @property
    def n_chars(self) -> int:
        return len(self.text)

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_parts(calibration: str, search: str, test: str) -> dict[Part, Text]:
    """The texts of the three parts, disjoint.

    ``docs`` gives each part its own topics. Another source that several parts name without a range is cut
    among them at line ends, in the order calibration, search, test, with lengths proportional to `SHARES`.

    Raises:
        TextError: if a text is missing, empty or unreadable, or if two parts overlap.
    """
    names: dict[Part, str] = {"calibration": calibration, "search": search, "test": test}
    sources = {part: parse(name, part) for part, name in names.items()}
    spans = _spans(sources)
    _check_disjoint(names, sources, spans)

    read = cache(lambda base: next(s for s in sources.values() if s.base == base).read())
    texts: dict[Part, Text] = {}
    for part, source in sources.items():
        whole = _read_docs(part) if source.base == DOCS else read(source.base)
        texts[part] = Text(part, names[part], _cut(whole, spans[part], names[part], part))
    for a, b in itertools.combinations(texts.values(), 2):
        if a.text == b.text:
            raise TextError(
                f"Expected disjoint texts, got the same content in `data.{a.part}` ({a.source}) and "
                f"`data.{b.part}` ({b.source}). Give different texts."
            )
    return texts


def load_text(source: str, part: Part) -> str:
    """The text of one source: of ``docs`` the topics of `part`, of anything else all of it or its range.

    For one part alone, e.g. to evaluate a model; `load_parts` is what keeps parts apart.

    Raises:
        TextError: if the text is missing, empty or unreadable.
    """
    parsed = parse(source, part)
    whole = _read_docs(part) if parsed.base == DOCS else parsed.read()
    return _cut(whole, parsed.span, source, part)


def _spans(sources: Mapping[Part, Source]) -> dict[Part, Span | None]:
    """The range of each part; contiguous ones for parts that name the same source without a range."""
    spans = {part: source.span for part, source in sources.items()}
    for base in {source.base for source in sources.values()} - {DOCS}:
        sharing = [part for part, source in sources.items() if source.base == base and source.span is None]
        if len(sharing) > 1:
            ends = list(itertools.accumulate((SHARES[part] for part in sharing), initial=0.0))
            spans |= {part: (ends[i] / ends[-1], ends[i + 1] / ends[-1]) for i, part in enumerate(sharing)}
    return spans


def _cut(text: str, span: Span | None, source: str, part: Part) -> str:
    """The characters between two fractions, both ends moved on to the next line."""
    if span is not None:
        text = text[_line_start(text, span[0]) : _line_start(text, span[1])]
    if not text.strip():
        where = "" if span is None else f" between {span[0]:g} and {span[1]:g} of its characters"
        raise TextError(f"Expected text in `data.{part}` ({source}), got none{where}. Give a longer text.")
    return text


def _line_start(text: str, fraction: float) -> int:
    at = round(fraction * len(text))
    if at in {0, len(text)}:
        return at
    return text.find("\n", at - 1) + 1 or len(text)


def _check_disjoint(
    names: Mapping[Part, str],
    sources: Mapping[Part, Source],
    spans: Mapping[Part, Span | None],
) -> None:
    for a, b in itertools.combinations(names, 2):
        one, other = sources[a], sources[b]
        if not one.origins & other.origins:
            continue
        (start, stop), (other_start, other_stop) = spans[a] or (0.0, 1.0), spans[b] or (0.0, 1.0)
        if one.base != other.base or max(start, other_start) < min(stop, other_stop):
            raise TextError(
                f"Expected disjoint texts, got `data.{a}: {names[a]}` and `data.{b}: {names[b]}`, which "
                "overlap. Give ranges that don't, e.g. PATH[0.0:0.4] and PATH[0.4:1.0], or PATH without any."
            )


def _read_docs(part: Part) -> str:
    try:
        return docs.split(SHARES)[part]
    except ModuleNotFoundError as error:
        raise TextError(
            f"Expected this Python to carry pydoc_data for `data.{part}: docs`, got none. Give a text file."
        ) from error
