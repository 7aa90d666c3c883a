"""Why candidates were infeasible, in few lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def grouped(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Reasons with their counts, the most frequent first; those that differ only in numbers count as one.

    Args:
        reasons: counts by reason. A group is named after its most frequent reason.
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason, n in Counter(reasons).most_common():
        counts[names.setdefault(_NUMBER.sub("#", reason), reason)] += n
    return counts.most_common()
