"""How many random formulas are undefined, blind, or the same as another one. No model: Gaussian probe layers.

python experiments/004-formulas-smollm2/duplicates.py [N] [SEED]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from secateur.pruners.formulas.evaluate import FormulaError
from secateur.pruners.formulas.fingerprint import fingerprint, gaussian_probes
from secateur.pruners.formulas.terminals import Terminals
from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.random_trees import ramped
from secateur.spaces.formulas.simplify import simplify
from secateur.spaces.formulas.tree import Bounds, Tree


def main(n: int = 2000, seed: int = 0) -> None:
    probes, sparsities = gaussian_probes(), [0.5]
    trees = ramped(np.random.default_rng(seed), n, Bounds())
    start = time.process_time()
    simple = [simplify(tree) for tree in trees]
    simplified = time.process_time()
    found = [mark(tree, probes, sparsities) for tree in simple]
    marked = time.process_time()
    digests = Counter(digest for digest, _ in found if digest)
    known = {fingerprint(parse(row.text), probes, sparsities): name for name, row in KNOWN.items()}
    reasons = Counter(kind(reason) for _, reason in found if reason)
    feasible, distinct = digests.total(), len(digests)
    sizes = [np.mean([x.size for x in some]) for some in (trees, simple)]
    print(f"{n} trees, mean size {sizes[0]:.1f}, simplified {sizes[1]:.1f}")
    print(f"distinct as text: {len(set(trees))}, simplified: {len(set(simple))}")
    print(f"infeasible {n - feasible} ({1 - feasible / n:.0%}): {dict(reasons.most_common())}")
    print(f"feasible {feasible}, distinct masks {distinct}: {1 - distinct / feasible:.0%} are duplicates")
    print(f"to be measured: {distinct / n:.1%} of what was generated")
    for digest, count in digests.most_common(6):
        example = min(
            (t for t, (other, _) in zip(simple, found, strict=True) if other == digest),
            key=lambda t: t.size,
        )
        print(f"  {count:4} like {print_formula(example)} {known.get(digest, '')}")
    spent = [1e3 * seconds / n for seconds in (simplified - start, marked - simplified)]
    print(f"CPU ms a tree: simplify {spent[0]:.2f}, fingerprint {spent[1]:.2f}")


def mark(tree: Tree, probes: Sequence[Terminals], sparsities: list[float]) -> tuple[str, str]:
    """The fingerprint, or the reason why there is none."""
    try:
        return fingerprint(tree, probes, sparsities), ""
    except FormulaError as error:
        return "", str(error)


def kind(reason: str) -> str:
    """What was wrong, without the numbers."""
    for word in ("same mask", "constant"):
        if word in reason:
            return word
    return reason.partition("got ")[2].partition("(")[0]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
