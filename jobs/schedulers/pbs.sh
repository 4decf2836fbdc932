# PBS Professional and OpenPBS. Only operators may requeue a job (qrerun), so a job that has saved submits itself again. PBS
# sends no warning; the run asks qstat for the end of its time.
job=$PBS_JOBID
restarts=${MPILM_RESTARTS:-0}

list_hosts() {
    cat "$PBS_NODEFILE" # a line per MPI process: mpiprocs in each chunk of `select`
}

requeue() {
    local again=("$jobs/submit" "${MPILM_SCRIPT:-}" "${arguments[@]}")
    if [ -z "${MPILM_SCRIPT:-}" ]; then
        refuse "this job was not submitted by jobs/submit, so it cannot submit itself again; it resumes when you submit it again"
    fi
    if [ -n "${PBS_ARRAY_INDEX:-}" ]; then export MPILM_TASK=$PBS_ARRAY_INDEX; fi
    if ! MPILM_RESTARTS=$((restarts + 1)) "${again[@]}"; then
        refuse "the job could not be submitted from this host; on a login node, this resumes the run: $(printf '%q ' "${again[@]}")"
    fi
}
