# Functions that jobs/common.sh, on the nodes of a job, and jobs/submit, on the login node, share.
set -euo pipefail

# refuse MESSAGE: end with one message, which states what to install or set.
refuse() {
    echo "jobs: $1" >&2
    exit 78
}

# Commands that your site needs are in jobs/site.sh: `module load python openmpi`, `source .venv/bin/activate`. MPILM_SITE names
# another file, or one of jobs/sites: MPILM_SITE=frontier. MPILM_VENV is an environment to activate afterwards.
load_site() {
    local site=${MPILM_SITE:-}
    if [ -z "$site" ]; then
        site=$jobs/site.sh
        if [ ! -e "$site" ]; then site=/dev/null; fi
    elif [ ! -e "$site" ] || [ -d "$site" ]; then
        site=$jobs/sites/$MPILM_SITE.sh
        if [ ! -e "$site" ]; then
            refuse "MPILM_SITE=$MPILM_SITE is neither a file nor one of $(cd "$jobs/sites" && echo *.sh | sed 's/\.sh//g')"
        fi
    fi
    set +eu # modules and conda use unset variables
    source "$site"
    if [ -n "${MPILM_VENV:-}" ]; then source "$MPILM_VENV/bin/activate" || exit 78; fi
    set -eu
}

# find_python: check that `python` has mpilm.
find_python() {
    if ! command -v python >/dev/null; then
        refuse "no python here: put \`source .venv/bin/activate\`, or what your site needs, into $jobs/site.sh"
    fi
    if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("mpilm") is None)'; then
        refuse "$(command -v python) has no mpilm: activate the environment in which you installed it in $jobs/site.sh"
    fi
}

# list_bad_hosts ARGUMENTS...: print the hosts that have computed wrongly in the run of these arguments (bad-hosts.json in its
# --run.dir), a host per line.
list_bad_hosts() {
    local run='' previous='' word
    for word in "$@"; do
        if [ "$previous" = --run.dir ]; then run=$word; fi
        case $word in --run.dir=*) run=${word#*=} ;; esac
        previous=$word
    done
    if [ ! -f "$run/bad-hosts.json" ]; then return; fi
    if ! python3 -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' "$run/bad-hosts.json" 2>/dev/null; then
        refuse "$run/bad-hosts.json is not JSON of the form {\"HOST\": []}; without the file the job may run on every host"
    fi
}
