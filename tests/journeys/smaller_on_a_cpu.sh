#!/usr/bin/env bash
# An ML engineer has a fine-tuned model and wants it 30 % smaller and faster on a CPU, with a stock class.
set -euo pipefail
model=$1 work=$2
secateur prune "$model" --max-params 0.7x --to "$work/smaller" --tokens 512 --window 128
echo "first useful result after $SECONDS s"
secateur latency "$work/smaller" --against "$model" --prompt 64 --rounds 10
