"""Settings of small searches of every space."""

from __future__ import annotations

EVALUATOR = {"window": 64, "calibration_tokens": 256, "fidelities": [128, 256], "test_tokens": 128}

SPACES = {
    "allocation": {"granularity": "sublayer", "target": [0.5, 0.9]},
    "architecture": {"target": 0.25},
    "formula": {"target": 0.5, "proxy": None, "known": ["wanda", "magnitude"]},
    "recipe": {"target": 0.5, "samples": [2], "length": [32], "pool_tokens": 2048, "subsets": 1, "known": []},
}


def settings(**changes):
    raw = {
        "space": {"kind": "allocation", **SPACES["allocation"]},
        "controller": {"kind": "random"},
        "evaluator": EVALUATOR,
        "budget": {"evaluations": 4},
    }
    return {**raw, **changes}
