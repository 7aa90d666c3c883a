"""Error in how the program is used, as against a failure."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(ValueError):
    """Error in settings, arguments or files, which the user can correct. The command ends with status 2.

    The message is one line: what was expected, what was given, what to do. Any other exception is a failure
    and ends the command with status 1.
    """
