#!/bin/bash
# sbatch docs/cluster/slurm.sh SETTINGS.yaml RUN: a Ray cluster for one search. See docs/how-to/cluster.md.
# RUN lies where all nodes see it. Five minutes before the time limit the search stops in order, and the job is queued
# again; the same command continues the run, too. With `gpus_per_worker` in the settings: sbatch --gpus-per-node=1 ...
#SBATCH --job-name=secateur
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

settings=${1:?Expected SETTINGS.yaml and RUN, got nothing. Usage: sbatch slurm.sh SETTINGS.yaml RUN}
run=${2:?Expected RUN after SETTINGS.yaml, got nothing. Usage: sbatch slurm.sh SETTINGS.yaml RUN}

# Change: where the code and its libraries are. A directory that all nodes see, or the same one on each.
source "${SECATEUR_ENV:-$HOME/secateur-env}/bin/activate"

# Jobs of several users on one node must not meet: a token, a port and a directory of this job alone.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
port=$((20000 + SLURM_JOB_ID % 10000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
read -r head_ip _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
temporary=/tmp/ray-$SLURM_JOB_ID # short: Ray's sockets lie in it

# Starts Ray on every node, the command on the head alone, and stops Ray when the command has ended.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --no-kill \
    ray symmetric-run --address "$head_ip:$port" --min-nodes "$SLURM_NNODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --temp-dir "$temporary" -- \
    secateur search "$settings" --run "$run" -o executor.kind=ray -o executor.address="$head_ip:$port" &
steps=$!

# The search alone is told to stop, by the process that its lock names; Ray goes on until it has ended.
stop() {
    pid=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["pid"])' "$run/run.lock") &&
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" kill -TERM "$pid"
}
trap stop USR1

status=0
wait "$steps" || status=$?
while kill -0 "$steps" 2>/dev/null; do # a signal ends `wait` before its time
    status=0
    wait "$steps" || status=$?
done
if grep -qs '"state": "stopped"' "$run/state.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
