"""Choice between a model that is loaded whole and one that is streamed, block by block, from its files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, silent
from secateur.search.errors import UsageError
from secateur.spaces.names import nearest

if TYPE_CHECKING:
    from secateur.pruners.models.loading import LoadedModel

STREAM = ("auto", "always", "never")
"""Words of `--stream`; auto: where a model on the CPU is large beside the free memory."""


def loader(word: str, loading: dict[str, Any], say: Say = silent) -> Callable[..., LoadedModel]:
    """`load_model` with these arguments, or by this word `load_mapped`.

    Args:
        word: out of `STREAM`.
        loading: arguments of both: ``dtype``, ``device`` and ``trust_remote_code``.
        say: told why a large model is not streamed, and what both say.

    Raises:
        UsageError: if the word is another.
    """
    from secateur.pruners.models.loading import load_model
    from secateur.pruners.models.mapped import NotStreamedError, load_mapped

    if word not in STREAM:
        raise UsageError(
            f"Expected `--stream` out of {', '.join(STREAM)}, got {word!r}.{nearest(word, STREAM)}"
        )
    whole: Callable[..., LoadedModel] = partial(load_model, **loading, say=say)
    if word == "never":
        return whole

    def load(name: str, **further: Any) -> LoadedModel:
        try:
            found = load_mapped(name, **loading, **further, only_large=word == "auto", say=say)
        except NotStreamedError as error:
            refuse(word, error, say)
            found = None
        return found or whole(name, **further)

    return load


def foretold_whole(word: str, tell: Callable[[], object], say: Say, *, may_stream: bool) -> str:
    """The word to go on with after the forecast, which is of a model that is loaded whole.

    Args:
        word: out of `STREAM`; always: nothing is foretold.
        tell: tells the forecast; raises a UsageError where something does not fit.
        say: told that a model is streamed because it does not fit.
        may_stream: False: the command can't stream what it is to do.

    Raises:
        UsageError: as `tell` does, unless the model may be streamed.
    """
    if word == "always":
        return word
    try:
        tell()
    except UsageError:
        if word == "never" or not may_stream:
            raise
        say("the model does not fit as a whole, and is streamed")
        return "always"
    return word


def refuse(word: str, error: ValueError, say: Say) -> None:
    """Say why a model is not streamed that need not be; raise a UsageError for one that is to be."""
    if word == "always":
        raise UsageError(f"{error} Use `--stream never` to load the model whole.") from error
    say(f"the model is loaded whole, and not streamed: {error}")
