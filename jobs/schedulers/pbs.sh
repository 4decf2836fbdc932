# PBS Professional and OpenPBS. Only operators may requeue a job (qrerun), so a job that has saved submits itself again. PBS
# sends no warning; the run asks qstat for the end of its time.
job=$PBS_JOBID
restarts=${MPILM_RESTARTS:-0}

list_hosts() {
    cat "$PBS_NODEFILE" # a line per MPI process: mpiprocs in each chunk of `select`
}

requeue() {
    if [ -n "${PBS_ARRAY_INDEX:-}" ]; then export MPILM_TASK=$PBS_ARRAY_INDEX; fi
    submit_again
}
