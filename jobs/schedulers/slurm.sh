# SLURM: srun starts the ranks. It sends signals to them itself, and ends the others when one dies (--kill-on-bad-exit).
job=$SLURM_JOB_ID
restarts=${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05 srun does not inherit it from sbatch
# SLURM decides whether a job that it ends with SIGTERM returns: a preempted job does, a cancelled one does not.
cancel_signals=(TERM)
warnings=()
needs_hostfile=''
placement=()

list_hosts() {
    scontrol show hostnames "$SLURM_JOB_NODELIST" | repeat_lines "$SLURM_NTASKS_PER_NODE"
}

avoid_hosts() {
    local left_out=$*
    placement=("--exclude=${left_out// /,}" "--nodes=$((SLURM_JOB_NUM_NODES - $#))" "--ntasks=${#hosts[@]}")
}

# `srun --mpi=list` shows the MPI types (pmix for Open MPI, pmi2 for MPICH and its relatives; a site with a default needs none).
run_ranks() {
    local code=0
    srun "${placement[@]}" --kill-on-bad-exit=1 --cpu-bind=cores ${MPILM_SRUN_MPI:+--mpi=$MPILM_SRUN_MPI} python -m "$@" || code=$?
    if [ "${MPILM_SRUN_MPI:-}" = pmi2 ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! is_own_code "$code"; then
        echo "jobs: if slurmstepd calls a client request invalid, set MPILM_SRUN_MPI=off: mpirun then starts the ranks, because" \
            "MPICH 5 sends lines that SLURM's pmi2 cuts" >&2
    fi
    return "$code"
}
if [ "${MPILM_SRUN_MPI:-}" = off ]; then use_mpirun; fi

is_reachable() {
    timeout --kill-after=5 60 srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap true
}

requeue() {
    scontrol requeue "$job" && sleep 300 # SLURM ends this script
}

# Remove the shared memory that MPICH left in /dev/shm when an earlier start of this job was killed. Its names derive from the
# numbers of job and step (FNV-1a, 32 bits), which stay the same after a requeue, so MPICH would reuse half-changed memory.
remove_stale_memory() {
    if [ "$restarts" = 0 ]; then return; fi
    local files='' step word hash i
    for step in 0 1 2 3 4 5; do
        word=$job.$step hash=2166136261
        for ((i = 0; i < ${#word}; i++)); do
            hash=$(((hash ^ $(printf %d "'${word:i:1}")) * 16777619 & 0xffffffff))
        done
        files+=$(printf ' /dev/shm/mpich_shm_%x_*' "$hash")
    done
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 sh -c "rm -f $files"
}

remove_stale_memory
