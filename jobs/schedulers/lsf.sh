# LSF: `bsub -wa USR1 -wt 2` warns a job two minutes before its run limit, where SIGUSR2 comes; bkill sends SIGINT and SIGTERM.
# `bsub -Q 99` returns a job that ends with this code to the queue.
job=$LSB_JOBID

list_hosts() {
    cat "$LSB_DJOB_HOSTFILE" # a line per slot
}

requeue() {
    exit 99
}
