#!/usr/bin/env bash
# A node without this code, without the driver's files and without an installed package that adds a metric: it is sent all
# three. As root, on one machine, with two Ray nodes:
#     bare_node.sh SCRATCH
# The second node is started without PYTHONPATH and in a mount namespace in which the run and the cache are empty; needs
# an environment whose Ray and libraries are installed and that finds secateur through PYTHONPATH alone.
set -euo pipefail
scratch=$(mkdir -p "$1" && cd "$1" && pwd)
mkdir -p "$scratch"/{driver,cache-a,cache-b}
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
common=(--num-cpus 1 --object-store-memory 100000000)
cleanup() { pkill -f "$scratch/(a|b)/" || true; sleep 3; pkill -KILL -f "$scratch/(a|b)/" || true; }
trap cleanup EXIT

cp -r "$(dirname "$0")/../../examples/plugin" "$scratch/source"
pip install --quiet --no-deps --no-build-isolation --target "$scratch/package" "$scratch/source"
export PYTHONPATH=${PYTHONPATH:-}:$scratch/package

SECATEUR_CACHE=$scratch/cache-a ray start --head --node-ip-address 127.0.0.12 --port 6712 --temp-dir "$scratch/a" \
    --include-dashboard=false --node-manager-port 21201 --object-manager-port 21202 --min-worker-port 21000 \
    --max-worker-port 21100 --dashboard-agent-listen-port 21203 --runtime-env-agent-port 21204 \
    --metrics-export-port 21205 "${common[@]}" >"$scratch/a.log" 2>&1
hide="mount -t tmpfs none $scratch/driver && mount -t tmpfs none $scratch/package && mount -t tmpfs none $scratch/cache-a && cd /"
env -u PYTHONPATH SECATEUR_CACHE="$scratch/cache-b" unshare -m bash -c "$hide && exec \"\$@\"" node \
    ray start --address 127.0.0.12:6712 --node-ip-address 127.0.0.13 --temp-dir "$scratch/b" --block \
    --node-manager-port 22201 --object-manager-port 22202 --min-worker-port 22000 --max-worker-port 22100 \
    --dashboard-agent-listen-port 22203 --runtime-env-agent-port 22204 --metrics-export-port 22205 \
    "${common[@]}" >"$scratch/b.log" 2>&1 &
sleep 20
SECATEUR_CACHE=$scratch/cache-a python -m secateur.search.cli search --run "$scratch/driver/run" \
    -o space.metric=deviation -o executor.kind=ray -o executor.address=127.0.0.12:6712 -o executor.workers=2 \
    -o 'evaluator.fidelities=[512, 2048]' -o evaluator.test_tokens=2048 -o budget.evaluations=60
echo "measurements of each worker:"
grep -o '"worker": "[^"]*"' "$scratch/driver/run/measurements.jsonl" | sort | uniq -c
echo "sent to the second node:"
find "$scratch/cache-b" -name .whole | wc -l
