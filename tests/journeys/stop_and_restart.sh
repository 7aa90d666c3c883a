#!/usr/bin/env bash
# An engineer searches with Ray and a database, looks on, stops the search, and starts it again.
set -euo pipefail
model=$1 work=$2 run=$2/run
search=(secateur search --run "$run" -o "model=$model" -o "storage=sqlite:///$work/mirror.db"
    -o "executor={kind: ray, workers: 1, batch: 2}" -o "controller={kind: random}"
    -o "space={metric: magnitude, target: [0.3, 0.5]}"
    -o "evaluator={window: 64, calibration_tokens: 256, fidelities: [2048], test_tokens: 256}")
"${search[@]}" -o budget.evaluations=100000 &
driver=$!
until [ -e "$run/state.json" ]; do sleep 0.2; done
secateur status "$run" --watch --every 0.5 | grep --max-count=1 evaluations || true
echo "first useful result after $SECONDS s"
kill -TERM "$driver"
status=0
wait "$driver" || status=$?
echo "stopped with status $status"
secateur status "$run" | grep state
known=$(wc -l <"$run/measurements.jsonl")
"${search[@]}" -o "budget.evaluations=$((known + 4))"
secateur status "$run" | grep state
