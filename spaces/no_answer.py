"""Error of a service, such as the model hub, that does not answer."""

from __future__ import annotations


class NoAnswerError(ValueError):
    """Service that does not answer, and may do so later; its message is one line for the user."""
