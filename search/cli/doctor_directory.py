"""Checks of a run or of an exported model by `doctor`: every line and every file, and rests of killed processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.search.cli.check import Check

MOST_LINES = 20
"""Bad lines that are shown."""


def is_run(directory: Path) -> bool:
    """True for a directory that holds a study."""
    from secateur.search.study.about import ABOUT

    return (directory / ABOUT).is_file()


def examine_run(directory: Path, *, repair: bool) -> list[Check]:
    """Checks of a run: its measurements, stores, exports, and rests of killed exports.

    Args:
        repair: set bad lines of the measurements aside.

    Raises:
        UsageError: if the run can't be read otherwise.
    """
    return [*_measurements(directory, repair=repair), *_stores(directory), *_exports(directory)]


def examine_export(directory: Path) -> list[Check]:
    """Checks of an export and of rests of killed ones beside it; none for other models."""
    from secateur.pruners.export.manifest import MANIFEST

    if not (directory / MANIFEST).is_file():
        return []
    return [_export(directory), *_leftovers(directory.absolute().parent, directory.name)]


def _measurements(directory: Path, *, repair: bool) -> Iterator[Check]:
    from secateur.search.results.run import Run
    from secateur.search.study.repair import bad_lines, set_aside
    from secateur.search.study.study import Study

    study = Study.without_trials(directory)
    bad = bad_lines(directory, Run(study).space.parse)
    if bad and not repair:
        yield from (Check(f"line {line.number}", line.reason, ok=False) for line in bad[:MOST_LINES])
        more = f"{len(bad)} lines can't be used. --repair sets them aside; numbers of later trials move up."
        yield Check("measurements", more, ok=False)
        return
    if bad:
        yield Check("set aside", f"{len(bad)} lines, to {set_aside(directory, bad)}", None)
    study.refresh()
    n_trials, n_unchanged = len(study.trials), study.n_unchanged
    as_written = f"; {n_unchanged:,} as their driver wrote them, by its checksum" if n_unchanged else ""
    yield Check("measurements", f"{n_trials:,} that can be used{as_written}")


def _stores(directory: Path) -> Iterator[Check]:
    """Level stores and statistics of a run."""
    from secateur.pruners.stores.block_files import INDEX, LevelStoreError, load_block, load_tensors

    for store in sorted(path.parent for path in directory.rglob(INDEX)):
        n_blocks = len(list(store.glob("block-*.safetensors")))

        def read_blocks(store: Path = store, n_blocks: int = n_blocks) -> str:
            for index in range(n_blocks):
                load_block(store, index)
            return f"{n_blocks} blocks"

        yield _checked(str(store.relative_to(directory)), read_blocks)
    for file in sorted(directory.glob("*.safetensors")):

        def read_file(file: Path = file) -> str:
            if load_tensors(file, None) is None:
                raise LevelStoreError(f"Expected stored tensors, got {file}, which is damaged. Delete it.")
            return "whole"

        yield _checked(file.name, read_file)


def _exports(directory: Path) -> Iterator[Check]:
    """Exports in a run's directory, and rests of killed ones."""
    from secateur.pruners.export.manifest import MANIFEST

    yield from (_export(path.parent) for path in sorted(directory.glob(f"**/{MANIFEST}")))
    yield from _leftovers(directory, "*")


def _export(directory: Path) -> Check:
    from secateur.pruners.export.manifest import check_files

    def read() -> str:
        n_files = check_files(directory)
        return f"{n_files} files as they were exported" if n_files else "whole weights; no checksums in it"

    return _checked(f"export {directory.name}", read)


def _leftovers(parent: Path, name: str) -> Iterator[Check]:
    from secateur.pruners.export.saving import STREAMED, leftovers

    for left in leftovers(parent, name):
        goes_on = left.name.endswith(f"-{STREAMED}")
        then = "The same command goes on from it, any other" if goes_on else "The next"
        yield Check("leftover", f"{left}, of a killed export. {then} export to there removes it.", None)


def _checked(name: str, read: Callable[[], str]) -> Check:
    try:
        return Check(name, read())
    except (ValueError, OSError) as error:
        return Check(name, str(error), ok=False)
