#!/usr/bin/env bash
# A researcher has a metric of her own, and wants three sparsities, seeds, and a table for a paper.
set -euo pipefail
model=$1 work=$2
cd "$work"
cat >my_metric.py <<'PYTHON'
"""Wanda with the square root of the norms."""


def score(weight, inputs, generator):
    return weight.abs() * inputs.norm.sqrt()
PYTHON
cat >mine.yaml <<YAML
model: $model
space: {kind: allocation, metric: "my_metric:score", target: [0.3, 0.5, 0.7], step: 0.1}
controller: {kind: random}
evaluator: {window: 64, calibration_tokens: 256, fidelities: [256], test_tokens: 512}
objectives: [loss, sparsity]
budget: {evaluations: 9}
YAML
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
secateur search mine.yaml --seeds 0,1,2 --run runs/mine
echo "first useful result after $SECONDS s"
secateur compare runs/mine-seed0 runs/mine-seed1 runs/mine-seed2 --form latex
