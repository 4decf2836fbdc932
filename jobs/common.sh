# What the batch scripts here share; they source it.
set -euo pipefail

# What a site needs goes into a file of your own, e.g. `module load python openmpi` and `source .venv/bin/activate`.
site=${MPILM_SITE:-jobs/site.sh}
if [ -f "$site" ]; then source "$site"; fi

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch since SLURM 22.05

# ranks MODULE ARGUMENTS...: one rank for every task.
# --kill-on-bad-exit: when one rank dies the others do not wait. MPI type: see `srun --mpi=list`
# (pmix for Open MPI, pmi2 for MPICH and its relatives; sites with a default of their own need none).
ranks() {
    srun --kill-on-bad-exit=1 --cpu-bind=cores ${MPILM_SRUN_MPI:+--mpi=$MPILM_SRUN_MPI} python -m "$@"
}

# tidy: remove what MPICH has left of this job in /dev/shm where it was killed. The names come from the numbers of job and step
# (FNV-1a, 32 bits), which a job that comes back has again: it would go on with memory that others have left half-changed.
tidy() {
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

# examine: is this allocation fit to train on? Once a job, not again when it comes back. MPILM_DOCTOR=off leaves it out.
examine() {
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "${MPILM_DOCTOR:-on}" != off ]; then
        "${1:-ranks}" mpilm.doctor --megabytes 1
    fi
}

# leave CODE: 75 says that the run has saved and stopped, and wants to go on: back into the queue with the job.
# MPILM_MAX_RESTARTS=0 lets it end instead, as in a chain of jobs.
leave() {
    if [ "$1" = 75 ] && [ -z "$ended_by_slurm" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MPILM_MAX_RESTARTS:-1000}" ]; then
        echo "job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 300  # SLURM ends this script
    fi
    exit "$1"
}

tidy

# SLURM's SIGTERM is for the ranks, which save; this shell stays to see how they end. Whether the job comes back is then
# SLURM's to say: a job that was preempted does, one that was cancelled does not.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM
