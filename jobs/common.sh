# Shared parts of the batch scripts, which source this file and then call one of its tasks: train, prepare, sweep or doctor.
# jobs/schedulers/NAME.sh defines what differs between schedulers:
#   job             number of this job
#   restarts        how often it has been in the queue before, if the scheduler counts it
#   cancel_signals  signals after which it must not return to the queue; SIGUSR1 and `warnings` announce its end
#   needs_hostfile  "" if mpirun finds the hosts itself
#   list_hosts      print its hosts, one line per rank
#   requeue         let it return to the queue
# and, where no mpirun starts the ranks: run_ranks, or start_ranks and signal_ranks; avoid_hosts; is_reachable. clean_up runs at
# the end.
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$jobs/library.sh"
arguments=("$@") # those of the batch script

find_scheduler() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then echo slurm
    elif [ -n "${PBS_JOBID:-}" ]; then echo pbs
    elif [ -n "${LSB_JOBID:-}" ]; then echo lsf
    elif [ -n "${_CONDOR_PROCNO:-}" ]; then echo htcondor
    elif [ -n "${JOB_ID:-}${PE_HOSTFILE:-}" ]; then echo grid-engine
    elif [ -n "${FLUX_URI:-}" ]; then echo flux
    elif [ -n "${KUBERNETES_SERVICE_HOST:-}" ]; then echo kubernetes
    fi
}

# The launcher gets a session of its own: a signal that the scheduler sends to all processes of the job then reaches this shell
# alone, which forwards SIGUSR1; mpirun would end the ranks at once at SIGTERM. The launcher dies with this shell
# (PR_SET_PDEATHSIG).
detach='import ctypes, os, sys; os.setsid(); ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])'

start_ranks() {
    local command
    read -ra command <<< "${MPILM_MPIRUN:-mpirun}"
    if ! command -v "${command[0]}" >/dev/null; then
        refuse "${command[0]} not found: load the MPI of your site in $jobs/site.sh, or set MPILM_MPIRUN to its launcher"
    fi
    if [ "${#hosts[@]}" = 0 ]; then mapfile -t hosts < <(list_hosts); fi
    printf '%s\n' "${hosts[@]}" > "$hostfile"
    command+=(${needs_hostfile:+--hostfile "$hostfile"} -n "${#hosts[@]}" "$(command -v python)")
    exec python -c "$detach" "${command[@]}" -m "$@"
}

signal_ranks() {
    kill -USR1 "$launcher" 2>/dev/null || true
}

# run_ranks MODULE ARGUMENTS...: start the ranks and wait for them.
run_ranks() {
    run_with_mpirun "$@"
}

use_mpirun() {
    run_ranks() { run_with_mpirun "$@"; }
    is_reachable() { reach_with_mpirun "$1"; }
}

run_with_mpirun() {
    local code
    start_ranks "$@" &
    launcher=$!
    while true; do
        code=0 interrupted=''
        wait "$launcher" || code=$?
        if [ "$code" -le 128 ] || [ -z "$interrupted" ]; then break; fi # a signal interrupts `wait`
    done
    launcher=''
    if ! is_own_code "$code"; then explain_launcher; fi
    return "$code"
}

# is_own_code CODE: it is one with which mpilm itself ends.
is_own_code() {
    [ "$1" = 0 ] || { [ "$1" -ge 64 ] && [ "$1" -le 90 ]; }
}

# explain_launcher: name the reason if the ranks could not start because the launcher belongs to another MPI than the library.
explain_launcher() {
    local command launcher_mpi library_mpi version
    version='import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())'
    read -ra command <<< "${MPILM_MPIRUN:-mpirun}"
    launcher_mpi=$("${command[0]}" --version 2>&1 | grep -oiE -m1 'open mpi|hydra|intel' || true)
    library_mpi=$(python -c "$version" 2>&1 | grep -oiE -m1 'open mpi|mpich|intel|No module named .*|cannot load .*' || true)
    case $launcher_mpi:$library_mpi in
        *:No* | *:cannot*) echo "jobs: Python loads no MPI ($library_mpi): load that of your site in $jobs/site.sh" >&2 ;;
        Open*:MPICH | Open*:Intel | HYDRA:Open* | Intel:Open*)
            echo "jobs: ${command[0]} belongs to $launcher_mpi, but Python loads $library_mpi: load one MPI in $jobs/site.sh," \
                "or set MPILM_MPIRUN to the launcher of $library_mpi" >&2
            ;;
    esac
}

# A signal while the doctor runs stops the job before it trains.
handle_signal() {
    stop=yes interrupted=yes
    if [ "$1" = cancel ]; then cancelled=yes; fi
    if [ -n "$training" ] && [ -n "$launcher" ]; then signal_ranks; fi
}

# choose_hosts ARGUMENTS...: use the hosts of this job except those that have failed, those that have computed wrongly in this run,
# and the last MPILM_SPARE_NODES of the others, which take the places of hosts that fail. The run resumes on any ranks with the
# same bits. Fails if no host is left.
choose_hosts() {
    local bad=() found all nodes host wrong=() fit=() used left_out=()
    found=$(list_bad_hosts "$@")
    if [ -n "$found" ]; then mapfile -t bad <<< "$found"; fi
    mapfile -t all < <(list_hosts)
    mapfile -t nodes < <(printf '%s\n' "${all[@]}" | awk '!seen[$0]++')
    if ! [ "$spares" -ge 0 ] 2>/dev/null || [ "$spares" -ge "${#nodes[@]}" ]; then
        refuse "MPILM_SPARE_NODES=$spares must be a number below that of the nodes of this job (${#nodes[@]})"
    fi
    for host in "${nodes[@]}"; do
        if is_in "$host" "${failed[@]}"; then continue; fi
        if is_in "${host%%.*}" "${bad[@]%%.*}"; then wrong+=("$host"); else fit+=("$host"); fi
    done
    if [ "${#fit[@]}" = 0 ] && [ "${#failed[@]}" = 0 ]; then
        echo "all nodes of this job have computed wrongly; jobs/submit asks the scheduler for others" >&2
        fit=("${nodes[@]}") wrong=()
    elif [ "${#fit[@]}" = 0 ]; then
        return 1
    fi
    if [ "${#wrong[@]}" != 0 ]; then echo "without the nodes that have computed wrongly: ${wrong[*]}"; fi
    used=("${fit[@]:0:${#nodes[@]}-spares}") hosts=()
    for host in "${nodes[@]}"; do
        if ! is_in "$host" "${used[@]}"; then left_out+=("$host"); fi
    done
    if [ "${#left_out[@]}" = 0 ]; then return; fi
    for host in "${all[@]}"; do
        if is_in "$host" "${used[@]}"; then hosts+=("$host"); fi
    done
    needs_hostfile=yes
    avoid_hosts "${left_out[@]}"
}

# find_failed_hosts: add to `failed` the hosts that no longer start a program; fail if there are none.
find_failed_hosts() {
    local host i all nodes=() probes before=${#failed[@]}
    mapfile -t all < <(list_hosts | awk '!seen[$0]++')
    for host in "${all[@]}"; do
        if ! is_in "$host" "${failed[@]}"; then nodes+=("$host"); fi
    done
    for ((i = 0; i < ${#nodes[@]}; i += 50)); do # so many at once
        probes=()
        for host in "${nodes[@]:i:50}"; do
            is_reachable "$host" >/dev/null 2>&1 < /dev/null &
            probes+=("$!")
        done
        for host in "${nodes[@]:i:50}"; do
            if ! wait "${probes[0]}" && [ -z "$stop" ]; then # a signal interrupts `wait`
                echo "$host does not start a program: this job goes on without it" >&2
                failed+=("$host")
            fi
            probes=("${probes[@]:1}")
        done
    done
    [ "${#failed[@]}" != "$before" ]
}

# is_reachable HOST: start a program there.
is_reachable() {
    reach_with_mpirun "$1"
}

reach_with_mpirun() {
    local command code=0
    read -ra command <<< "${MPILM_MPIRUN:-mpirun}"
    echo "$1" > "$hostfile-$1"
    timeout --kill-after=5 60 "${command[@]}" --hostfile "$hostfile-$1" -n 1 true || code=$?
    rm -f "$hostfile-$1"
    return "$code"
}

# repeat_lines COUNT: copy the input, each line that often.
repeat_lines() {
    awk -v count="$1" '{ for (i = 0; i < count; i++) print }'
}

# is_in WORD WORDS...
is_in() {
    local word=$1 other
    shift
    for other in "$@"; do
        if [ "$word" = "$other" ]; then return 0; fi
    done
    return 1
}

avoid_hosts() { :; } # start_ranks uses the hosts that remain

clean_up() { :; }

# Check with mpilm.doctor that this allocation is fit to train on: at the first start of a job, not after a requeue.
# MPILM_DOCTOR=off skips it.
check_allocation() {
    if [ "$restarts" = 0 ] && [ "${MPILM_DOCTOR:-on}" != off ]; then run_ranks mpilm.doctor --megabytes 1; fi
}

# exit_or_requeue CODE: after code 75 (the run has saved and stopped on request) the job returns to the queue.
# MPILM_MAX_RESTARTS=0 lets it end instead, as in a chain of jobs. SIGUSR1 ends ranks that have not begun to train (10 in MPICH,
# 138 in Open MPI): nothing is lost.
exit_or_requeue() {
    local code=$1
    case $code in 10 | 138) if [ -n "$stop" ]; then code=75; fi ;; esac
    if [ "$code" = 75 ] && [ -z "$cancelled" ] && [ "$restarts" -lt "${MPILM_MAX_RESTARTS:-1000}" ]; then
        echo "job $job goes back into the queue"
        requeue
    fi
    exit "$code"
}

# submit_again: `requeue` for schedulers that let only operators return a job to the queue.
submit_again() {
    local again=("$jobs/submit" "${MPILM_SCRIPT:-}" "${arguments[@]}")
    if [ -z "${MPILM_SCRIPT:-}" ]; then
        echo "jobs: only jobs/submit lets a job submit itself again; the run has saved, and resumes when you do" >&2
    elif ! MPILM_RESTARTS=$((restarts + 1)) "${again[@]}"; then
        echo "jobs: this host cannot submit jobs; on a login node, this resumes the run: $(printf '%q ' "${again[@]}")" >&2
    fi
}

# train_until_done ARGUMENTS...: train; if a host has failed, or has computed wrongly, go on without it. Where the remaining ones
# are too few, the job returns to the queue.
train_until_done() {
    local code
    training=yes
    while true; do
        code=0
        if [ -z "$stop" ]; then run_ranks mpilm.train "$@" || code=$?; else code=75; fi
        if [ -n "$stop" ]; then break; fi
        case $code in 0 | 65 | 71 | 74 | 75 | 87 | 90 | 130) break ;; esac
        if [ "$code" = 78 ]; then
            if [ "${#failed[@]}" != 0 ]; then code=75; fi
            break
        fi
        if [ "$code" = 88 ]; then
            if [ "$(list_bad_hosts "$@")" = "$bad_before" ]; then break; fi
        elif ! find_failed_hosts; then
            if [ -n "$stop" ]; then code=75; fi
            break
        fi
        bad_before=$(list_bad_hosts "$@")
        if ! choose_hosts "$@"; then
            code=75
            break
        fi
        echo "training resumes on ${#hosts[@]} ranks"
    done
    exit_or_requeue "$code"
}

# train ARGUMENTS...: train, and save before the job ends.
train() {
    bad_before=$(list_bad_hosts "$@")
    choose_hosts "$@"
    check_allocation
    train_until_done "$@"
}

# sweep FILE ARGUMENTS...: train with the flags in a line of the file.
sweep() {
    local file=${1:-} number lines flags name
    number=${MPILM_TASK:-${SLURM_ARRAY_TASK_ID:-${PBS_ARRAY_INDEX:-${LSB_JOBINDEX:-${SGE_TASK_ID:-0}}}}}
    if [ ! -f "$file" ]; then refuse "the first argument must be a file with the flags of the runs; '$file' is not a file"; fi
    shift
    lines=$(awk 'END { print NR }' "$file")
    if ! [ "$number" -ge 1 ] 2>/dev/null || [ "$number" -gt "$lines" ]; then
        refuse "$file has no line $number; jobs/submit starts a run for each of its $lines lines (or sbatch --array=1-$lines)"
    fi
    read -ra flags <<< "$(sed -n "${number}p" "$file")"
    name=$(basename "$file")
    set -- --run.dir "runs/${name%.*}-$number" "$@" "${flags[@]}"
    bad_before=$(list_bad_hosts "$@")
    choose_hosts "$@"
    train_until_done "$@"
}

# prepare ARGUMENTS...: turn text into token files.
prepare() {
    export RAYON_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of the tokenizer
    run_ranks mpilm.prepare "$@"
}

# doctor ARGUMENTS...: check this cluster.
doctor() {
    run_ranks mpilm.doctor "$@"
}

scheduler=$(find_scheduler)
if [ -z "$scheduler" ]; then
    refuse "no scheduler has started this script: submit it, as in \`$jobs/submit $jobs/train.sbatch ARGUMENTS\`"
fi
restarts=0 needs_hostfile=yes cancel_signals=(TERM INT HUP) warnings=(USR2)
hosts=() failed=() spares=${MPILM_SPARE_NODES:-0} launcher='' stop='' interrupted='' cancelled='' training=''
source "$jobs/schedulers/$scheduler.sh"
load_site
find_python
hostfile=$(mktemp "${TMPDIR:-/tmp}/mpilm-hosts.XXXXXX")
trap 'rm -f "$hostfile"; clean_up' EXIT
trap 'handle_signal cancel' "${cancel_signals[@]}"
trap 'handle_signal warning' USR1 "${warnings[@]}"
