"""Silence of transformers while models are loaded and saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines below errors. The settings are the process's: not for use in threads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        with warnings.catch_warnings():  # the hub warns if its environment variable forbids bars
            warnings.simplefilter("ignore")
            if bars:
                logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()
