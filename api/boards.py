"""The command ``bench`` as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.api.commands import Bos, silent

if TYPE_CHECKING:
    from secateur.search.board.rows import Board


def bench(
    *models: str,
    run: str | Path,
    methods: Literal["all"] | Sequence[str] | None = None,
    sparsities: Sequence[str | float] | None = None,
    calibration: Sequence[Literal["equal", "published"]] | None = None,
    calibration_text: str | None = None,
    contrast_text: str | None = None,
    calibration_tokens: int | None = None,
    calibration_window: int | None = None,
    text: Sequence[str] | None = None,
    tokens: int | None = None,
    window: int | None = None,
    bos: Bos | None = None,
    allow_long_windows: bool | None = None,
    seeds: Sequence[int] | None = None,
    tasks: Sequence[str] | None = None,
    task_dir: str | Path | None = None,
    samples: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    workers: int | None = None,
    override: Sequence[str] = (),
    markdown: str | Path | None = None,
    say: Callable[[str], None] = silent,
) -> Board:
    """Measure pruning methods on models, or continue where it stopped, and write their tables.

    What is None is as ``secateur bench`` has it by default, which describes these words.

    Args:
        models: each ``tiny``, a hub id, a directory or a .gguf file.
        run: directory of the run, made if it is missing; the tables are its ``METHODS.md`` and ``methods.html``.
        methods: names of ``secateur list recipes``, or all.
        sparsities: shares to remove, of all units (0.5) or of one (``weights=0.5``).
        calibration: ``equal`` tokens for all methods, the ``published`` number of each, or both.
        contrast_text: second calibration text, of methods that compare two.
        calibration_text, calibration_tokens, calibration_window: what methods calibrate on.
        text, tokens, window, bos, allow_long_windows: what models are measured on.
        seeds: of calibration windows, and of what methods draw.
        tasks, task_dir, samples: tasks that all models answer.
        dtype, device, trust_remote_code: how models are loaded.
        workers: of a Ray on this machine; None: one cell after another.
        override: settings such as ``executor.kind=ray``.
        markdown: file of the Markdown, in place of ``METHODS.md``.
        say: given progress, one line at a time, e.g. `print`.

    Returns:
        The board: ``tables()`` has its rows, ``cells`` the measurements.

    Raises:
        UsageError: if a setting, a model or a text is wrong, or the directory belongs to a board of other settings.

    Example:
        >>> board = secateur.bench("tiny", run="runs/board", methods=["wanda", "magnitude"], sparsities=["weights=0.5"])
        >>> [row.method for row in board.tables()[0].rows]
        ['wanda', 'magnitude']
    """
    from secateur.search import app
    from secateur.search.board.settings import board_settings, workers_words

    asked: dict[str, Any] = {
        "methods": methods,
        "sparsities": None if sparsities is None else tuple(map(str, sparsities)),
        "calibration": calibration,
        "calibration_text": calibration_text,
        "contrast_text": contrast_text,
        "calibration_tokens": calibration_tokens,
        "calibration_window": calibration_window,
        "text": text,
        "tokens": tokens,
        "window": window,
        "bos": bos,
        "allow_long_windows": allow_long_windows,
        "seeds": seeds,
        "tasks": tasks,
        "task_dir": None if task_dir is None else str(task_dir),
        "samples": samples,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    given = {"models": models} | {key: x for key, x in asked.items() if x is not None}
    settings = board_settings(given, [*workers_words(workers), *override])
    return app.bench(settings, Path(run), markdown=None if markdown is None else Path(markdown), say=say)
