"""Choice between a model that is loaded whole and one that is streamed, block by block, from its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.pruners.models.checkpoints.checkpoint import Say, silent
from secateur.pruners.models.loading import CheckConfig, LoadedModel, load_model
from secateur.pruners.models.mapped import MappedModel, NotStreamedError, load_mapped
from secateur.spaces.streaming import stream_word


def open_model(
    name: str,
    *,
    stream: str = "auto",
    check: CheckConfig = lambda config: None,
    check_streamed: Callable[[MappedModel], None] = lambda mapped: None,
    say: Say = silent,
    **loading: Any,
) -> LoadedModel:
    """Open a model: `load_mapped` or `load_model`.

    Args:
        name: see `load_model`.
        stream: a word of `STREAM`; auto: streamed where the model is on the CPU and large beside the free memory.
        check: see `load_model`.
        check_streamed: raises a NotStreamedError for a model that can't be streamed for what it is to be used for.
        say: told why a large model is not streamed, and what both say.
        loading: arguments of both: ``dtype``, ``device`` and ``trust_remote_code``.

    Raises:
        ValueError: if the word is another, or a model can't be streamed that always is to be; as `load_model` does.
    """
    word = stream_word(stream)
    if word != "never":
        try:
            found = load_mapped(name, **loading, check=check, only_large=word == "auto", say=say)
            if found is not None:
                check_streamed(found)
                return found
        except NotStreamedError as error:
            refuse(word, error, say)
    return load_model(name, **loading, check=check, say=say)


def refuse(word: str, error: NotStreamedError, say: Say) -> None:
    """Say why a model is not streamed that need not be; raise a NotStreamedError for one that is to be."""
    if word == "always":
        raise NotStreamedError(f"{error} Set `stream` to never to load the model whole.") from error
    say(f"the model is loaded whole, and not streamed: {error}")
