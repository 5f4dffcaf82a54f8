#!/bin/bash
# A Ray cluster of one job: its first node is the head, the others join it by SSH between the nodes.
#
#     sbatch examples/slurm/cluster.sh python train.py
#
# Needs on every node: rayfwd and ray on the PATH, and a login by SSH from node to node (pam_slurm_adopt
# lets a job's owner in). Everything of a job is in directories of its own, named after it: two jobs, of
# one user or of two, may share nodes.
#SBATCH --job-name=ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
# SIGTERM comes a minute before the end, to the steps (`srun`): they leave in order.
#SBATCH --signal=TERM@60

set -euo pipefail

# Homes are shared between nodes, and locks and sockets are a node's own.
places="${TMPDIR:-/tmp}/rayfwd-$SLURM_JOB_ID"
export STATE_DIRECTORY="$places/state" RUNTIME_DIRECTORY="$places/run"
export RAYFWD_CLUSTER="job-$SLURM_JOB_ID"

hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${hosts[0]}
hub="$RUNTIME_DIRECTORY/clusters/$RAYFWD_CLUSTER/hub.sock"
one=(srun --overlap --nodes=1 --ntasks=1)
cpus=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}")

# A job that lacks something ends here, and says where.
srun --overlap bash -c 'for name in rayfwd ray; do command -v "$name" > /dev/null ||
    { echo "$(hostname): $name is not on the PATH" >&2; exit 1; }; done'

"${one[@]}" --nodelist="$head" rayfwd head "${cpus[@]}" &
nodes=($!)
for host in "${hosts[@]:1}"; do
    "${one[@]}" --nodelist="$host" rayfwd join "$USER@$head" --name "$host" --socket "$hub" \
        --ephemeral "${cpus[@]}" &
    nodes+=($!)
done

# The driver begins when the head is ready; Ray waits for the others as they come.
"${one[@]}" --nodelist="$head" bash -c '
    until rayfwd status > /dev/null 2>&1; do sleep 1; done
    exec rayfwd exec -- "$@"' driver "$@" &
driver=$!
code=0
wait -n "${nodes[0]}" "$driver" || code=$?
if kill -0 "$driver" 2> /dev/null; then
    echo "rayfwd on $head has ended, and so does the job" >&2
    kill "$driver"
    [ "$code" -ne 0 ] || code=1
fi

# The steps are told, which leave in order; an srun that is told kills its step at once.
scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "${nodes[@]}" 2> /dev/null || true
wait || true
exit "$code"
