"""Why candidates were infeasible, in few lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def grouped(reasons: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Reasons and how often each came, the most frequent first; those that differ in numbers alone count as one.

    Args:
        reasons: the most frequent first: a group is called by its first one.
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason, n in reasons:
        counts[names.setdefault(_NUMBER.sub("#", reason), reason)] += n
    return counts.most_common()
