"""Lazy import of Ray, with its logging and usage statistics off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError

_ENVIRONMENT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # no messages about dead workers on stdout; the executor reports them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without GPUs sees none; else a warning about the change
}
"""Defaults: variables set by the user take precedence."""

_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_ray() -> None:
    """Set the environment variables that Ray reads at its first import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if token_source() is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a head sets this by itself, a driver does not


@contextlib.contextmanager
def kept_to_this_machine() -> Iterator[None]:
    """Context in which a Ray that is started listens to 127.0.0.1 alone, as it always does on macOS and Windows.

    Ray reads the variable when it is first imported: the context has to hold that, too. A process that has started such
    a Ray joins no cluster of other machines afterwards.
    """
    before = os.environ.get(_CLUSTERS)
    os.environ.setdefault(_CLUSTERS, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CLUSTERS]


def token_source() -> str | None:
    """Place that Ray's token comes from: a variable of the environment, or a file; None if there is none."""
    file = Path.home() / ".ray" / "auth_token"
    found = [f"${name}" for name in _TOKENS if name in os.environ] + [str(file)] * file.exists()
    return found[0] if found else None


def load_ray() -> Any:
    """The module `ray`.

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
