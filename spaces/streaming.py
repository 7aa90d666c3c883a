"""Words that say whether a model is loaded whole or streamed block by block from its files."""

from __future__ import annotations

from typing import Literal, get_args

from secateur.spaces.names import nearest

Stream = Literal["auto", "always", "never"]
"""auto: streamed where it does not fit as a whole, or is large beside the free memory."""

STREAM: tuple[Stream, ...] = get_args(Stream)


def stream_word(word: str) -> Stream:
    """The word itself.

    Raises:
        ValueError: if it is another.
    """
    found = next((x for x in STREAM if x == word), None)
    if found is None:
        raise ValueError(
            f"Expected `--stream` out of {', '.join(STREAM)}, got {word!r}.{nearest(word, STREAM)}"
        )
    return found
