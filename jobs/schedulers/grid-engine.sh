# Grid Engine: SIGUSR1 comes at s_rt, and with -notify SIGUSR2 before the job is killed. Exit code 99 returns a job to the queue.
job=$JOB_ID
restarts=${RESTARTED:-0}
cancel_signals=(TERM INT HUP USR2)
warnings=()

# PE_HOSTFILE has a host and its number of slots in each line; a slot is a core.
list_hosts() {
    if [ -z "${PE_HOSTFILE:-}" ]; then
        hostname
        return
    fi
    awk -v threads="${OMP_NUM_THREADS:-1}" '{ for (i = 0; i < int($2 / threads); i++) print $1 }' "$PE_HOSTFILE"
}

requeue() {
    exit 99
}
