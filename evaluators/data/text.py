"""Texts for calibration, search and test, which never overlap.

A source, or one range of it, that several parts have in common is cut for them into contiguous pieces by `SHARES`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from secateur.evaluators.data import docs
from secateur.evaluators.data.documents import Say, TextError, silent
from secateur.evaluators.data.sources import DOCS, Span, TextSource, parse
from secateur.spaces.method import CONTRAST

Part = Literal["calibration", "search", "test"]
SHARES: Mapping[Part, float] = MappingProxyType({"calibration": 0.3, "search": 0.4, "test": 0.3})
_APART = "Give ranges that don't, e.g. PATH[0.0:0.4] and PATH[0.4:1.0]."
MEASURED: tuple[Part, ...] = ("search", "test")
"""Parts for measurements: no other text may overlap with theirs."""


@dataclass(frozen=True)
class Text:
    """The text of one part.

    Args:
        part: ``calibration``, ``search`` or ``test``.
        source: as in the settings.
        text: the text, not empty.
    """

    part: Part
    source: str
    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_parts(calibration: str, search: str, test: str, say: Say = silent) -> dict[Part, Text]:
    """The texts of the three parts, disjoint.

    ``docs`` gives each part its own topics. Another source that several parts name without a range, or with the same
    one, is cut among them at line ends, in the order calibration, search, test, with lengths proportional to `SHARES`.

    Raises:
        TextError: if a text is missing, empty or unreadable, or if two parts overlap.
    """
    pieces = _pieces(calibration, search, test)
    for a, b in itertools.combinations(pieces.values(), 2):
        _check_apart(
            a, b, "Give ranges that don't, e.g. PATH[0.0:0.4] and PATH[0.4:1.0], or PATH without any."
        )
    read = cache(lambda base: next(x.source for x in pieces.values() if x.source.base == base).read(say))
    texts: dict[Part, Text] = {}
    for part, piece in pieces.items():
        whole = _read_docs(part) if piece.source.base == DOCS else read(piece.source.base)
        texts[part] = Text(part, piece.name, _cut(whole, piece))
    for one, other in itertools.combinations(texts.values(), 2):
        _check_different(one, f"data.{one.part}", other.text, f"data.{other.part}", other.source)
    return texts


def load_sources(
    sources: Mapping[str, str], calibration: str, search: str, test: str, say: Say = silent
) -> dict[str, Text]:
    """Further texts to calibrate on, by name, each disjoint from search and test, but not from one another.

    The one named ``contrast`` is disjoint from the others, too. ``docs`` gives the topics of the calibration part. What
    `data.calibration` names, too, is cut as it is there.

    Args:
        sources: the further texts, by name; an empty one is that of `calibration`.
        calibration, search, test: sources of the three parts, see `load_parts`.

    Raises:
        TextError: if a text is missing, empty or unreadable, or overlaps with search or test, or the contrast text.
    """
    parts, pieces = load_parts(calibration, search, test), _pieces(calibration, search, test)
    further = {name: _further(f"sources.{name}", x or calibration, pieces) for name, x in sources.items()}
    texts: dict[str, Text] = {}
    for name, piece in further.items():
        key, source = piece.key, piece.source
        for part in MEASURED:
            _check_apart(piece, pieces[part], _APART)
        if name != CONTRAST and CONTRAST in further:
            _check_apart(further[CONTRAST], piece, _APART)
        whole = _read_docs("calibration") if source.base == DOCS else source.read(say)
        texts[name] = Text("calibration", piece.address, _cut(whole, piece))
        for part in MEASURED:
            _check_different(texts[name], key, parts[part].text, f"data.{part}", parts[part].source)
    for name, text in texts.items():
        if name != CONTRAST and CONTRAST in texts:
            against = texts[CONTRAST]
            _check_different(text, f"sources.{name}", against.text, f"sources.{CONTRAST}", against.source)
    return texts


def load_contrast(contrast: str, calibration: str, search: str, test: str, say: Say = silent) -> Text:
    """The second calibration text, disjoint from the three parts.

    ``docs`` gives the topics of the calibration part: the calibration text is then another.

    Raises:
        TextError: if it is missing, empty or unreadable, or overlaps with another, which is named.
    """
    parts, pieces, key = (
        load_parts(calibration, search, test),
        _pieces(calibration, search, test),
        "data.contrast",
    )
    source = parse(contrast, key)
    piece = _Piece(key, contrast, source, source.span)
    for other in pieces.values():
        _check_apart(piece, other, _APART)
    whole = _read_docs("calibration") if source.base == DOCS else source.read(say)
    found = Text("calibration", piece.address, _cut(whole, piece))
    for part, text in parts.items():
        _check_different(found, key, text.text, f"data.{part}", text.source)
    return found


def _further(key: str, name: str, pieces: Mapping[Part, _Piece]) -> _Piece:
    """Range of a further source; of what the calibration part names, too, that part's."""
    source, like = parse(name, key), pieces["calibration"]
    alike = (source.base, source.span) == (like.source.base, like.source.span)
    return _Piece(key, name, source, like.span if alike else source.span)


def calibration_address(calibration: str, search: str, test: str) -> str:
    """The source of the calibration part with the range that `load_parts` cuts it to."""
    return _pieces(calibration, search, test)["calibration"].address


def measured_address(source: str, among: Sequence[str] = ()) -> str:
    """A source with the range that is measured on as the test part.

    Args:
        source: of the search and the test part; of the test part alone where `among` is empty.
        among: the source of the calibration part; empty: all of `source` is measured on.

    Returns:
        E.g. ``notes.txt[0.5:1.0]``, which measures the same tokens anywhere, or ``docs, the topics of test``.
    """
    parsed = parse(source, "data.test")
    if parsed.base == DOCS:
        return f"{source}, the topics of test"
    if among:
        return _pieces(among[0], source, source)["test"].address
    start, stop = parsed.span or (0.0, 1.0)
    return source if parsed.span else f"{source}[{start!r}:{stop!r}]"


def load_text(source: str, part: Part, say: Say = silent) -> str:
    """The text of one source: of ``docs`` the topics of `part`, of anything else all of it or its range.

    For one part alone, e.g. to evaluate a model; `load_parts` is what keeps parts apart.

    Raises:
        TextError: if the text is missing, empty or unreadable.
    """
    key = f"data.{part}"
    parsed = parse(source, key)
    whole = _read_docs(part) if parsed.base == DOCS else parsed.read(say)
    return _cut(whole, _Piece(key, source, parsed, parsed.span))


@dataclass(frozen=True)
class _Piece:
    """Range of a source.

    Args:
        key: of the setting, for errors.
        name: its value.
        source: parsed from it.
        span: the fractions of its characters; None: all of it, or of ``docs`` the part's topics.
    """

    key: str
    name: str
    source: TextSource
    span: Span | None

    @property
    def address(self) -> str:
        """The name with the range, also if the source was cut for several parts."""
        if self.span is None or self.span == self.source.span:
            return self.name
        whole = self.name if self.source.span is None else self.name[: self.name.rindex("[")]
        return f"{whole}[{self.span[0]!r}:{self.span[1]!r}]"


def _pieces(calibration: str, search: str, test: str) -> dict[Part, _Piece]:
    """The range of each part; contiguous ones for parts with the same source and the same range, or none."""
    names: dict[Part, str] = {"calibration": calibration, "search": search, "test": test}
    sources = {part: parse(name, f"data.{part}") for part, name in names.items()}
    spans = {part: source.span for part, source in sources.items()}
    for base, span in {(source.base, source.span) for source in sources.values() if source.base != DOCS}:
        sharing = [part for part, source in sources.items() if (source.base, source.span) == (base, span)]
        if len(sharing) > 1:
            start, stop = span or (0.0, 1.0)
            ends = list(itertools.accumulate((SHARES[part] for part in sharing), initial=0.0))
            at = [start + (stop - start) * end / ends[-1] for end in ends]
            spans |= {part: (at[i], at[i + 1]) for i, part in enumerate(sharing)}
    return {part: _Piece(f"data.{part}", names[part], sources[part], spans[part]) for part in names}


def _cut(text: str, piece: _Piece) -> str:
    """The characters between two fractions, both ends moved on to the next line."""
    span = piece.span
    if span is not None:
        text = text[_line_start(text, span[0]) : _line_start(text, span[1])]
    if not text.strip():
        where = "" if span is None else f" between {span[0]:g} and {span[1]:g} of its characters"
        raise TextError(
            f"Expected text in `{piece.key}` ({piece.name}), got none{where}. Give a longer text."
        )
    return text


def _line_start(text: str, fraction: float) -> int:
    at = round(fraction * len(text))
    if at in {0, len(text)}:
        return at
    return text.find("\n", at - 1) + 1 or len(text)


def _check_apart(one: _Piece, other: _Piece, remedy: str) -> None:
    if not one.source.origins & other.source.origins:
        return
    (start, stop), (other_start, other_stop) = one.span or (0.0, 1.0), other.span or (0.0, 1.0)
    if one.source.base != other.source.base or max(start, other_start) < min(stop, other_stop):
        raise TextError(
            f"Expected disjoint texts, got `{one.key}: {one.name}` and `{other.key}: {other.name}`, which "
            f"overlap. {remedy}"
        )


def _check_different(text: Text, key: str, other: str, other_key: str, other_source: str) -> None:
    if text.text == other:
        raise TextError(
            f"Expected disjoint texts, got the same content in `{key}` ({text.source}) and "
            f"`{other_key}` ({other_source}). Give different texts."
        )


def _read_docs(part: Part) -> str:
    try:
        return docs.split(SHARES)[part]
    except ModuleNotFoundError as error:
        raise TextError(
            f"Expected this Python to carry pydoc_data for `data.{part}: docs`, got none. Give a text file."
        ) from error
