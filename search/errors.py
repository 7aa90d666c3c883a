"""Errors that a person can mend, told apart from failures."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong use: settings, arguments or files are not what they should be. The command ends with status 2.

    The message is one line: what was expected, what came, what to do. Whatever else is raised is a failure
    and ends the command with status 1.
    """
