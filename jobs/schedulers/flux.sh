# Flux: a batch script is the first program of an instance of its own, in which `flux run` starts the ranks. The run asks
# `flux job timeleft` for the end of its time. A job that has saved submits itself again, to the parent instance.
job=$(flux getattr jobid)
restarts=${MPILM_RESTARTS:-0}
placement=()

list_hosts() {
    flux hostlist --expand --delimiter=$'\n' instance | repeat_lines "$MPILM_RANKS_PER_NODE"
}

avoid_hosts() {
    local left_out=$*
    placement=("--requires=-host:${left_out// /,}")
}

start_ranks() {
    if [ "${#hosts[@]}" = 0 ]; then mapfile -t hosts < <(list_hosts); fi
    local command=(flux run "${placement[@]}" --ntasks="${#hosts[@]}" --cores-per-task="$MPILM_CORES_PER_RANK")
    exec python -c "$detach" "${command[@]}" python -m "$@"
}

is_reachable() {
    timeout --kill-after=5 60 flux run --requires="host:$1" --ntasks=1 true
}

explain_launcher() { :; } # it is no mpirun

signal_ranks() {
    flux job kill --signal=SIGUSR1 "$(flux job last)" || true
}

requeue() {
    MPILM_FLUX=--parent submit_again
}
