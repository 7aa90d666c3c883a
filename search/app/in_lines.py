"""A search for scripts that run several in turn."""

from __future__ import annotations

from pathlib import Path

from secateur.search.app.searching import search
from secateur.search.loop.loop import Outcome
from secateur.search.settings.settings import Settings
from secateur.search.show.lines import Lines


def search_in_lines(settings: Settings, directory: Path, *, levels: Path | None = None) -> Outcome:
    """`search`, which prints a line for each stage and each round under the directory's name.

    Args:
        settings, directory, levels: see `search`.

    Raises:
        UsageError, StudyWriteError: as `search` does.
    """
    lines = Lines(directory.name, settings)
    return search(
        settings, directory, observers=[lines], say=lines.say, on_ready=lines.on_ready, levels=levels
    )
