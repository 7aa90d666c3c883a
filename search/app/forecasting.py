"""Forecasts of commands: by settings for `plan`, and the lines that a command begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.search.app.forecast_parts import parse_devices
from secateur.search.app.forecast_prune import forecast_prune
from secateur.search.app.forecast_search import forecast_search
from secateur.search.app.recipe_file import file_for
from secateur.search.app.session import Say, silent
from secateur.search.errors import UsageError
from secateur.search.settings.settings import Settings
from secateur.spaces.forecast import Forecast
from secateur.spaces.streaming import Stream, stream_word


def planned(
    settings: Settings,
    recipe: str | None = None,
    sparsity: float = 0.5,
    device: str | None = None,
    *,
    timing: bool = True,
    directory: Path | None = None,
    say: Say = silent,
) -> Forecast:
    """Forecast of a search, or of a pruning of its model.

    Args:
        settings: of the search; of a pruning the model and how it is loaded are used.
        recipe: name or file; None: a search.
        sparsity: share that the recipe removes.
        device: see `parse_devices`; None: that of the settings.
        timing: time a block of this shape on this machine.
        directory: of the run; None: ``runs``.
        say: given progress, one line at a time.

    Raises:
        UsageError: if settings, recipe or devices don't fit.
    """
    devices = [] if device is None else parse_devices(device)
    if recipe is None:
        return forecast_search(settings, directory or Path("runs"), devices=devices, timing=timing, say=say)
    file, _ = file_for(recipe, sparsity)
    loading = {key: getattr(settings, key) for key in ("dtype", "device", "trust_remote_code")}
    of = settings.evaluator
    return forecast_prune(
        stream=settings.stream,
        file=file,
        model=settings.model,
        tokens=of.test_tokens,
        window=of.window,
        loading=loading,
        devices=devices,
        timing=timing,
        say=say,
    )


ALL_MACS = 2e11
"""Multiply-accumulates of a command beyond which a block is timed for its forecast: less takes seconds."""


def foretold(make: Callable[[bool], Forecast], note: Say, *, anyway: bool = False) -> Forecast | None:
    """Forecast of a command that is about to run, which is told; None if there is none for this model.

    It is that of a streamed model where the model does not fit as a whole, and does so.

    What is wrong with settings or model is left for the command to say.

    Args:
        make: the forecast, with times or without.
        note: given its lines.
        anyway: go on where something does not fit.

    Raises:
        UsageError: if something does not fit.
    """
    from secateur.search.show.forecast import refusal, short_lines

    try:
        found = make(False)
        if refusal(_fitting(found, silent)) is None and found.tokens * found.subject["parameters"] > ALL_MACS:
            found = make(True)
        found = _fitting(found, note)
    except ValueError:
        return None
    except Exception as error:  # noqa: BLE001  # of torch and transformers, on a model without memory: no reason to stop
        note(f"forecast: none for this model ({type(error).__name__})")
        return None
    for line in short_lines(found):
        note(line)
    problem = refusal(found)
    if problem and not anyway:
        raise UsageError(f"{problem} `--anyway` goes on regardless.")
    return found


def _fitting(found: Forecast, note: Say) -> Forecast:
    """The forecast, or that of a streamed model where this alone fits, which is said."""
    streamed = found.streamed
    if streamed is None or found.too_large() is None or streamed.too_large() is not None:
        return found
    note("the model does not fit as a whole, and is streamed")
    return streamed


def stream_by(forecast: Forecast | None, word: str) -> Stream:
    """The word for `open_model` after the forecast: a model of which nothing was foretold is streamed as was asked.

    Raises:
        UsageError: if it is no word of `STREAM`.
    """
    try:
        asked = stream_word(word)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return "always" if forecast is not None and forecast.subject.get("stream") == "always" else asked


def forecast_before(
    settings: Settings, directory: Path, note: Say, *, anyway: bool = False
) -> Forecast | None:
    """Forecast of a search that is about to begin, see `foretold`."""
    return foretold(lambda timing: forecast_search(settings, directory, timing=timing), note, anyway=anyway)
