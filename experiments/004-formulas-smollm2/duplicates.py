"""How many random formulas are undefined, blind, or the same as another one. No model: Gaussian probe layers.

python experiments/004-formulas-smollm2/duplicates.py [N] [SEED]
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import numpy as np

from secateur.pruners.formulas.fingerprint import fingerprint
from secateur.pruners.formulas.probe import gaussian_probes
from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.random_trees import ramped
from secateur.spaces.formulas.simplify import simplify
from secateur.spaces.formulas.tree import Bounds


def main(n: int = 2000, seed: int = 0) -> None:
    probes, sparsities = gaussian_probes(), [0.5]
    trees = ramped(np.random.default_rng(seed), n, Bounds())
    start = time.process_time()
    simple = [simplify(tree) for tree in trees]
    simplified = time.process_time()
    found = [fingerprint(tree, probes, sparsities) for tree in simple]
    marked = time.process_time()
    digests = Counter(x.digest for x in found if x.digest)
    known = {fingerprint(parse(row.text), probes, sparsities).digest: name for name, row in KNOWN.items()}
    reasons = Counter(kind(x.reason) for x in found if x.reason)
    feasible, distinct = digests.total(), len(digests)
    sizes = [np.mean([x.size for x in some]) for some in (trees, simple)]
    print(f"{n} trees, mean size {sizes[0]:.1f}, simplified {sizes[1]:.1f}")
    print(f"distinct as text: {len(set(trees))}, simplified: {len(set(simple))}")
    print(f"infeasible {n - feasible} ({1 - feasible / n:.0%}): {dict(reasons.most_common())}")
    print(f"feasible {feasible}, distinct masks {distinct}: {1 - distinct / feasible:.0%} are duplicates")
    print(f"to be measured: {distinct / n:.1%} of what was generated")
    for digest, count in digests.most_common(6):
        example = min(
            (t for t, x in zip(simple, found, strict=True) if x.digest == digest), key=lambda t: t.size
        )
        print(f"  {count:4} like {print_formula(example)} {known.get(digest, '')}")
    spent = [1e3 * seconds / n for seconds in (simplified - start, marked - simplified)]
    print(f"CPU ms a tree: simplify {spent[0]:.2f}, fingerprint {spent[1]:.2f}")


def kind(reason: str) -> str:
    """What was wrong, without the numbers."""
    for word in ("same mask", "constant"):
        if word in reason:
            return word
    return reason.partition("got ")[2].partition("(")[0]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
