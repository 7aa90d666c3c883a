"""Measure any model."""

from __future__ import annotations

from secateur.search.app.bench import Say, silent
from secateur.search.errors import UsageError


def evaluate(
    model: str,
    *,
    text: str = "docs",
    part: str = "test",
    n_tokens: int = 8192,
    window: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = silent,
) -> dict[str, float | str | int]:
    """Perplexity of a model on a text, in windows without overlap, and how many of its weights are zero.

    Args:
        model: see `load_model`.
        text: source of text; of ``docs`` the topics of `part`.
        n_tokens: tokens to measure on, a multiple of `window`.
        window: tokens that the model sees at once.

    Raises:
        UsageError: if the model or the text is not what it should be.
    """
    from secateur.evaluators.perplexity import evaluate_model

    try:
        return evaluate_model(
            model,
            text=text,
            part=part,
            n_tokens=n_tokens,
            window=window,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            say=say,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
