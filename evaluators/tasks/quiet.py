"""Lm-eval without its log and its progress bars, which would disturb ours."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors are logged while the context lasts; needs lm-eval."""
    import datasets
    from lm_eval.api import task as building  # the one of its bars that no argument turns off

    logger, bar, shown = (
        logging.getLogger("lm_eval"),
        building.tqdm,
        not datasets.are_progress_bars_disabled(),
    )
    level = logger.level
    logger.setLevel(logging.ERROR)
    building.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        building.tqdm = bar
        if shown:
            datasets.enable_progress_bars()
