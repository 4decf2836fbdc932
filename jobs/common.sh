# Shared parts of the batch scripts, which source this file.
set -euo pipefail

# Commands that your site needs go into a file of your own: `module load python openmpi`, `source .venv/bin/activate`.
site=${MPILM_SITE:-jobs/site.sh}
if [ -f "$site" ]; then source "$site"; fi

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # since SLURM 22.05 srun does not inherit it from sbatch

# avoid_bad_hosts ARGUMENTS...: leave out the nodes that have computed wrongly in this run (bad-hosts.json in its --run.dir). It
# resumes on the ranks of the other nodes, with the same bits.
placement=()
avoid_bad_hosts() {
    local run= host bad=
    while [ $# -gt 1 ]; do
        if [ "$1" = --run.dir ]; then run=$2; fi
        shift
    done
    if [ ! -f "$run/bad-hosts.json" ]; then return; fi
    for host in $(python -m mpilm.doctor --bad-hosts "$run" | tr , ' '); do
        if scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qx "${host%%.*}"; then bad+=" ${host%%.*}"; fi
    done
    local count=$(wc -w <<< "$bad")
    if [ "$count" = 0 ] || [ "$count" = "$SLURM_JOB_NUM_NODES" ]; then return; fi
    echo "without the nodes that have computed wrongly:$bad"
    placement=("--exclude=$(tr ' ' , <<< "${bad# }")" "--nodes=$((SLURM_JOB_NUM_NODES - count))"
        "--ntasks=$((SLURM_NTASKS - count * SLURM_NTASKS_PER_NODE))")
}

# run_ranks MODULE ARGUMENTS...: start one rank per task.
# --kill-on-bad-exit: when one rank dies, the others do not wait. `srun --mpi=list` shows the MPI types
# (pmix for Open MPI, pmi2 for MPICH and its relatives; a site with a default needs none).
run_ranks() {
    srun "${placement[@]}" --kill-on-bad-exit=1 --cpu-bind=cores ${MPILM_SRUN_MPI:+--mpi=$MPILM_SRUN_MPI} python -m "$@"
}

# Remove the shared memory that MPICH left in /dev/shm when an earlier start of this job was killed. Its names derive from the
# numbers of job and step (FNV-1a, 32 bits), which stay the same after a requeue, so MPICH would reuse half-changed memory.
remove_stale_memory() {
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then return; fi
    local files= step word hash i
    for step in 0 1 2 3 4 5; do
        word=$SLURM_JOB_ID.$step hash=2166136261
        for ((i = 0; i < ${#word}; i++)); do
            hash=$(((hash ^ $(printf %d "'${word:i:1}")) * 16777619 & 0xffffffff))
        done
        files+=$(printf ' /dev/shm/mpich_shm_%x_*' $hash)
    done
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 sh -c "rm -f $files"
}

# Check with mpilm.doctor that this allocation is fit to train on: at the first start of a job, not after a requeue.
# MPILM_DOCTOR=off skips it.
check_allocation() {
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "${MPILM_DOCTOR:-on}" != off ]; then
        "${1:-run_ranks}" mpilm.doctor --megabytes 1
    fi
}

# exit_or_requeue CODE: after code 75 (the run has saved and stopped on request) the job returns to the queue.
# MPILM_MAX_RESTARTS=0 lets it end instead, as in a chain of jobs.
exit_or_requeue() {
    if [ "$1" = 75 ] && [ -z "$ended_by_slurm" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MPILM_MAX_RESTARTS:-1000}" ]; then
        echo "job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 300  # SLURM ends this script
    fi
    exit "$1"
}

remove_stale_memory

# SLURM sends SIGTERM to the ranks, which save; this shell stays to see how they end. SLURM then decides whether the job
# returns: a preempted job does, a cancelled one does not.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM
