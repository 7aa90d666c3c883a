"""Rank correlations of linear models of slots that learn the loss, or a transform of it.

    python links.py SCRATCH

SCRATCH is that of `landscape.py`, which measures 1,132 candidates of `tiny` at 60 %. The features and the regression
are those of the controller `surrogate`. Printed are rank correlations with the loss of candidates held out: walks of
mutations from the uniform one, minimisers of perturbed sums of losses alone, and the better half of these.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from landscape import Measured, alone, together
from scipy.stats import spearmanr

from secateur.search.controllers.separable import solve
from secateur.search.controllers.surrogate.features import Features, smooth_table
from secateur.search.controllers.surrogate.loss_model import EXCESSES
from secateur.search.controllers.surrogate.regression import Regression

LINKS = {"loss": lambda x: x / x.min(), "square root": lambda x: np.sqrt(x / x.min()), "logarithm": np.log}
FITS = 12


def foretold(
    features: Features, train: np.ndarray, values: np.ndarray, test: np.ndarray, *, grouped: bool, pairs: bool
):
    mean, deviation, scaled = features.prior
    if not pairs:
        deviation = np.where(np.arange(features.n) < 1 + 2 * train.shape[1], deviation, 1e-6)
    groups = (
        np.searchsorted(EXCESSES, values - values.min(), side="right")
        if grouped
        else np.zeros(len(values), int)
    )
    model = Regression(
        np.append(0.0, mean),
        np.append(10.0, deviation),
        np.append(False, scaled),
        (1, len(EXCESSES) + 1),
        0.1,
    )
    rows = np.column_stack([np.ones(len(train)), features.of(train)])
    for group in set(groups.tolist()):
        model.add(rows[groups == group], values[groups == group], group)
    for _ in range(FITS):
        model.fit()
    return np.column_stack([np.ones(len(test)), features.of(test)]) @ model.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    measured = Measured(parser.parse_args().scratch)
    space = measured.session.space
    curves = list(np.maximum(alone(measured), 0))
    kinds = together(space, np.array(curves))
    labels = np.array([kind for kind, some in kinds.items() for _ in some])
    candidates = [candidate for some in kinds.values() for candidate in some]
    losses, levels = measured.losses(candidates), np.array([candidate.levels for candidate in candidates])
    held_out = np.random.default_rng(0).random(len(losses)) < 0.3
    near = held_out & (labels == "near")
    shown = {
        "walk": held_out & (labels == "walk"),
        "near": near,
        "better": near & (losses < np.median(losses[near])),
    }
    print(
        "| prior | learnt | residual scale | pairs | walk | near | better half |\n|---|---|---|---|---:|---:|---:|"
    )
    for prior, table in (("measured alone", curves), ("smooth", smooth_table(space))):
        center = solve(space, table, 0).levels
        whole = sum(float(row[i]) for row, i in zip(table, center, strict=True))
        features = Features(space, table, whole, center)
        cases = [(link, False, False) for link in LINKS] + [
            ("logarithm", True, False),
            ("logarithm", True, True),
        ]
        for link, grouped, pairs in cases:
            values = LINKS[link](losses)[~held_out]
            found = foretold(features, levels[~held_out], values, levels, grouped=grouped, pairs=pairs)
            ranks = [spearmanr(found[some], losses[some])[0] for some in shown.values()]
            how = "by excess" if grouped else "one"
            cells = " | ".join(f"{rank:.2f}" for rank in ranks)
            print(f"| {prior} | {link} | {how} | {'yes' if pairs else 'no'} | {cells} |")


if __name__ == "__main__":
    main()
