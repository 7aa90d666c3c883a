"""Measure a board of methods, or continue one: every method on every model, each cell in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.board_cell import board_texts, file_of, no_windows, open_model, task_plan
from secateur.search.app.cell_processes import CellSetup
from secateur.search.app.pruning import pruner_on
from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.board.cells import DENSE, Cell, cells_of
from secateur.search.board.rows import Board
from secateur.search.board.settings import BoardSettings, identity
from secateur.search.errors import UsageError
from secateur.search.executor import measure_all
from secateur.search.executors.registry import EXECUTORS
from secateur.search.show.board import write_board
from secateur.search.study.about import ABOUT, BOARD, About, check_before, read_about
from secateur.search.study.lock import RunLock
from secateur.search.study.study import Study
from secateur.spaces.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.evaluators.data.text import Text
    from secateur.pruners.models.anatomy import Anatomy
    from secateur.pruners.models.loading import LoadedModel

WRITE_S = 10.0
"""Least time between two writings of the tables while cells are measured."""


@usage_errors()
def bench(
    settings: BoardSettings,
    directory: Path,
    *,
    folders: Sequence[Path] = (),
    markdown: Path | None = None,
    say: Say = silent,
) -> Board:
    """Measure the cells of a board that its run does not have yet.

    A cell that can't be measured, for the model's family, its size, the memory or the text, is refused with the
    reason before any is. Each measured cell is a line of the run's ``measurements.jsonl`` at once; the tables follow.

    Args:
        settings: of the board. Other models, methods, shares, seeds, calibrations and workers may continue a run.
        directory: of the run; made if it is missing.
        folders: absolute, that relative paths are looked for in; none: the working directory.
        markdown: file of the tables in Markdown; None: ``METHODS.md`` of the run. The page is its ``methods.html``.
        say: given progress, one line at a time.

    Returns:
        The board, with whatever other cells its run has.

    Raises:
        UsageError: if a model, a text or a task is wrong, or the directory belongs to a board of other settings.
        StudyWriteError: if the disk is full; the same call continues.
    """
    of_cells = identity(settings)
    check_before(directory, {BOARD: of_cells})
    row, folders = EXECUTORS[settings.executor.kind], folders or (Path.cwd(),)
    threads = settings.executor.threads if row.in_process else settings.executor.worker_threads
    plain = settings.model_dump(mode="json")
    setup = CellSetup(plain, tuple(map(str, folders)), threads)
    with row.reached(settings.executor, setup):
        content, texts = _content(settings, folders)
        wanted = [cell for cell in cells_of(settings) if cell.text not in _known(directory, settings)]
        found, refused = _checked(wanted, settings, folders, texts, say)
        models = _same_models(directory, found)
        about = About(
            {BOARD: of_cells, "content": content}, facts={"models": models, "versions": _versions()}
        )
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory)
        try:
            with Study.open_or_create(directory, plain, about, lock) as study:
                for line in study.warnings:
                    say(line)
                tables = _Tables(study, settings, models, markdown)
                try:
                    _measure(study, settings, setup, wanted, refused, tables, say)
                finally:
                    tables.write()
                return tables.board
        finally:
            lock.close()


@dataclass
class _Tables:
    """Tables of a board that is being measured, as files.

    Args:
        study: of the board.
        settings: of it.
        models: fingerprints by name.
        markdown: see `bench`.
        written: time of the last writing, on the clock of `time.monotonic`.
    """

    study: Study
    settings: BoardSettings
    models: Mapping[str, str]
    markdown: Path | None
    written: float = -math.inf

    @property
    def board(self) -> Board:
        """Board of the cells measured so far, with those that are missing."""
        known = {trial.measurement.candidate for trial in self.study.trials}
        missing = tuple(cell for cell in cells_of(self.settings) if cell.text not in known)
        return Board(tuple(self.study.trials), self.models, missing)

    def follow(self) -> None:
        """Write, unless that was a moment ago."""
        if time.monotonic() - self.written > WRITE_S:
            self.write()

    def write(self) -> None:
        write_board(self.board, self.settings, self.study.directory, self.markdown)
        self.written = time.monotonic()


def _measure(  # what `bench` has prepared
    study: Study,
    settings: BoardSettings,
    setup: CellSetup,
    wanted: Sequence[Cell],
    refused: Mapping[str, str],
    tables: _Tables,
    say: Say,
) -> None:
    """Append the measurements of these cells as they come, refusals first."""
    fidelity = settings.fidelity
    texts = [cell.text for cell in wanted if study.lookup((cell.text, fidelity.text)) is None]
    study.append([Measurement(x, fidelity, infeasible=refused[x]) for x in texts if x in refused])
    left = [text for text in texts if text not in refused]
    if not left:
        return
    n_done = 0
    say(f"measuring 0/{len(left)}: {left[0]}")
    with EXECUTORS[settings.executor.kind].build(settings.executor, setup) as executor:
        for measured in measure_all(executor, left, fidelity, size=1):
            study.append(measured)
            tables.follow()
            n_done += len(measured)
            say(f"measuring {n_done}/{len(left)}" + "".join(f": {m.candidate}" for m in measured[-1:]))


def _known(directory: Path, settings: BoardSettings) -> frozenset[str]:
    """Cells that the run has."""
    if not (directory / ABOUT).is_file():
        return frozenset()
    trials = Study.open(directory).trials
    return frozenset(x.measurement.candidate for x in trials if x.measurement.fidelity == settings.fidelity)


def _content(
    settings: BoardSettings, folders: Sequence[Path]
) -> tuple[dict[str, str], tuple[dict[str, Text], dict[str, Text]]]:
    """Hashes of all but the models that values depend on, and the texts."""
    from secateur.evaluators.tasks.task_set import tasks_sha256

    sources, measured = texts = board_texts(settings, folders)
    hashes = {f"{name}_text": text.sha256 for name, text in sources.items()}
    hashes |= {f"text {name}": text.sha256 for name, text in measured.items()}
    tasks = task_plan(settings, folders)
    return hashes | ({} if tasks is None else {"tasks": tasks_sha256(tasks)}), texts


def _checked(
    cells: Sequence[Cell],
    settings: BoardSettings,
    folders: Sequence[Path],
    texts: tuple[dict[str, Text], dict[str, Text]],
    say: Say,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fingerprints of the models of some cells by name, and the reason of each cell that can't be measured."""
    found: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(cell.model for cell in cells):
        say(f"checking {name}")
        loaded, anatomy, n_positions = open_model(name, settings, folders, say)
        found[name] = loaded.fingerprint
        _check_measures(settings, folders, loaded, anatomy.bos, texts[1])
        reasons: dict[tuple[str, str], str | None] = {}
        for cell in (cell for cell in cells if cell.model == name and cell.method != DENSE):
            key = cell.method, cell.calibration  # neither share nor seed decides
            if key not in reasons:
                reasons[key] = _refusal(cell, settings, loaded, anatomy, n_positions, texts[0])
            reason = reasons[key]
            refused |= {} if reason is None else {cell.text: reason}
    return found, refused


def _check_measures(
    settings: BoardSettings,
    folders: Sequence[Path],
    loaded: LoadedModel,
    bos: int | None,
    texts: Mapping[str, Text],
) -> None:
    """Raise a ValueError for a text with too few tokens, or a task that can't be loaded."""
    from secateur.evaluators.data.tokens import windows
    from secateur.evaluators.tasks.task_set import TaskSet

    for text in texts.values():
        windows(loaded.tokenizer, text, settings.window, settings.tokens, bos=bos)
    if (plan := task_plan(settings, folders)) is not None:
        TaskSet(plan, loaded.model, loaded.tokenizer, settings.bos)


def _refusal(
    cell: Cell,
    settings: BoardSettings,
    loaded: LoadedModel,
    anatomy: Anatomy,
    n_positions: int | None,
    sources: Mapping[str, Text],
) -> str | None:
    """Reason why a method can't be run on a model, its calibration texts or this machine; None if it can."""
    from secateur.pruners.calibration.choose import choose
    from secateur.pruners.calibration.pool import build_pools

    try:
        file = file_of(cell, settings, n_positions)
        file.check()
        file.check_model(anatomy)
        pruner = pruner_on(file, loaded, anatomy, sources, settings.window, no_windows())
        if cell.row.uses_data:
            tokens: dict[str, Tensor] = {x: y.tokens for x, y in pruner.calibration.sources.items()}
            choose(build_pools(anatomy, tokens, look=False), file.form["calibration"], file.seed)
    except ValueError as error:
        return str(error)
    return None


def _same_models(directory: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of all models of a run by name, with those that were found now.

    Raises:
        UsageError: if one is another than it was.
    """
    known: dict[str, str] = {}
    if (directory / ABOUT).is_file():
        known = dict(read_about(directory).facts.get("models", {}))
    for name, fingerprint in found.items():
        if known.get(name, fingerprint) != fingerprint:
            raise UsageError(
                f"Expected the model {name} that {directory} has measured, got another. Restore it, or name another "
                "directory."
            )
    return {**known, **found}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("secateur", "torch", "transformers")}
