"""Second-order forms of the loss by what they sum: Kronecker factors or single tokens, with or without the first one.

    python forms.py SCRATCH [--model tiny] [--text docs] [--levels DIR] [--share 0.6] [--every 1] [--windows 4]

For every slot of a space of SparseGPT levels, pruned alone to a share: the loss that each form foretells, beside the
KL on the search text. Prints each form's rank correlation with it, the spread of its error, and the ratio of its sum
to the loss of the uniform candidate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.evaluators.session import Session
from secateur.pruners.calibration.fisher import walk_back
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.options import AllOptions
from secateur.search.app.session import open_session
from secateur.search.controllers.proxy_screening import spearman
from secateur.search.settings.settings import settings_from

FORMS = ("kronecker", "kronecker, without first tokens", "kronecker, first tokens apart", "tokens")


def opened(args: argparse.Namespace) -> Session:
    data = dict.fromkeys(("calibration", "search", "test"), args.text)
    return open_session(
        settings_from(
            {
                "model": args.model,
                "space": {
                    "kind": "allocation",
                    "metric": "sparsegpt",
                    "target": args.share,
                    "step": 0.1,
                    "max_sparsity": 0.9,
                },
                "evaluator": {
                    "window": args.window,
                    "calibration_tokens": args.calibration_tokens,
                    "fidelities": [args.loss_tokens],
                    "test_tokens": args.window,
                    "data": data,
                },
                "controller": {"kind": "uniform"},
                "executor": {"kind": "local", "threads": 1},
            }
        )
    )


def foretold(session: Session, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Loss by slot that each form foretells, in nats a token."""
    options, tokens = AllOptions(session.pruner), session.pruner.calibration.tokens[: args.windows]
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(linear: Linear, inputs: Tensor, gradients: Tensor) -> None:
        calls.setdefault(linear.name, []).append((inputs.float(), gradients.float()))

    drawn = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    dense = {linear.name: linear.weight for linear in session.anatomy.linears}
    for block in walk_back(session.anatomy, tokens, add, watched=options.watched, drawn=drawn):
        for each in options.of(block.index):
            at = list(session.space.options(each.slot)).index(round(10 * args.share))
            name = session.space.slots[each.slot]
            for form in FORMS:
                found[form][name] = 0.0
            for projection in each.weights[0]:
                if projection not in calls:
                    continue
                x, g = (torch.cat(parts) for parts in zip(*calls[projection], strict=True))
                change = each.changes(projection, dense[projection])[at].view_as(dense[projection])
                for form, value in zip(FORMS, forms(x, g, change, tokens.shape[1]), strict=True):
                    found[form][name] += value
        calls.clear()
    return found


def forms(x: Tensor, g: Tensor, change: Tensor, length: int) -> list[float]:
    """Foretold loss of one projection's change by each of `FORMS`, in nats a token."""
    first = torch.arange(len(x)) % length == 0

    def kronecker(keep: Tensor) -> float:
        a, b = x[keep].T @ x[keep] / keep.sum(), g[keep].T @ g[keep] / len(x)
        return 0.5 * float(((b @ change @ a) * change).sum())

    later, tokens = kronecker(~first), 0.5 * float(((g * (x @ change.T)).sum(1) ** 2).sum()) / len(x)
    return [kronecker(first | ~first), later, later + kronecker(first), tokens]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--levels", type=Path)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--loss-tokens", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    args = parser.parse_args()
    levels = args.levels or args.scratch / "levels"
    session = opened(args)
    session.build_levels(levels)
    session.pruner.open(levels)
    with torch.no_grad():
        by_form = foretold(session, args)
    evaluator, space, search = session.evaluator(levels), session.space, session.plan.fidelities[0]
    baselines = space.baselines()
    dense = list(space.disassemble(baselines["dense"]))
    texts, names = [], list(space.slots)[:: args.every]
    for name in names:
        options = list(dense)
        options[list(space.slots).index(name)] = round(10 * args.share)
        texts.append(space.assemble(options).text)
    uniform = list(baselines.values())[1].text
    measured = [m.values["kl"] for m in evaluator.evaluate([uniform, *texts], search)]
    truth = np.maximum(measured[1:], 1e-9)
    print(f"{args.model}: uniform {measured[0]:.4f}; slots alone sum to {sum(truth) * args.every:.4f}")
    print("| form | rank correlation | its log error, RMS about the mean | sum over uniform's loss |")
    print("|---|---:|---:|---:|")
    for form, values in by_form.items():
        own = np.array([values[name] for name in names])
        error = np.log(np.maximum(own, 1e-12)) - np.log(truth)
        share = sum(values.values()) / measured[0]
        print(f"| {form} | {spearman(own, truth):.3f} | {error.std():.2f} | {share:.2f} |")
    for row in zip(names, truth, *([by_form[form][name] for name in names] for form in FORMS), strict=True):
        print(" ".join([row[0], *(f"{value:.3g}" for value in row[1:])]))


if __name__ == "__main__":
    main()
