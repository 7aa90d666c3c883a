"""Peak memory of pruning a model once, beside the model's own.

python peak.py [--model DIR] [--text FILE] [--tokens 4096] [--metric sparsegpt]
"""

from __future__ import annotations

import argparse
import resource

from secateur.evaluators.session import Session
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m@wheel")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--metric", default="sparsegpt")
    args = parser.parse_args()
    data = dict.fromkeys(("calibration", "search", "test"), args.text)
    evaluator = {"data": data, "calibration_tokens": args.tokens, "fidelities": [512], "test_tokens": 512}
    space = {"kind": "allocation", "metric": args.metric, "target": 0.6, "max_sparsity": 0.9}
    session = Session(plan(settings_from({"model": args.model, "space": space, "evaluator": evaluator})))
    shape, block = session.dense.shape, session.anatomy.blocks[0]
    session.loaded.model(session.pruner.calibration.tokens[:1])  # touches every weight
    before = peak_mb()
    session.pruner.prune(session.space.config(session.space.baselines()["uniform@0.6"]), sequential=True)
    gram = 4 * sum(linear.in_features**2 for linear in block.linears)
    weights = 4 * sum(linear.n_weights for linear in block.linears)
    pruned = 4 * sum(linear.n_weights for linear in session.anatomy.linears)
    states = 4 * session.pruner.calibration.tokens.numel() * session.anatomy.width
    rows = {
        "weights of the model": 4 * shape.n_params,
        "those of its blocks, which pruning makes anew": pruned,
        "Gram matrices of a block": gram,
        "weights of a block": weights,
        "hidden states of the calibration set": states,
    }
    print(
        f"peak before pruning {before:,.0f} MB, after {peak_mb():,.0f} MB: {peak_mb() - before:,.0f} MB more"
    )
    for name, n_bytes in rows.items():
        print(f"  {name}: {n_bytes / 2**20:,.0f} MB")


if __name__ == "__main__":
    main()
