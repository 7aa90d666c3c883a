"""Ray, imported when it is needed, and quiet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError

_ENVIRONMENT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray prints to stdout that a worker died; the executor says so by itself
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without GPUs sees none; else a warning about the change
}
"""What the user has set stays."""

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_ray() -> None:
    """Set what Ray reads when it, or one of its libraries, is imported for the first time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if any(name in os.environ for name in _TOKENS) or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as a head does by itself, and a driver does not


def load_ray() -> Any:
    """The module.

    Raises:
        UsageError: if it is not installed.
    """
    prepare_ray()
    try:
        import ray
    except ImportError:
        raise UsageError(
            "Expected Ray for the executor `ray`, found none. Install it: pip install 'secateur[ray]'."
        ) from None
    return ray
