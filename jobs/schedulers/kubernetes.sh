# Kubernetes with the MPI Operator: this script runs in the launcher, whose pod starts again after a code other than 0.
job=$HOSTNAME
restarts=0

# The operator names the file of the workers and their slots as the MPI of the MPIJob does: `host slots=8` or `host:8`.
list_hosts() {
    local file=${OMPI_MCA_orte_default_hostfile:-${HYDRA_HOST_FILE:-${I_MPI_HYDRA_HOST_FILE:-/etc/mpi/hostfile}}}
    sed 's/ slots=/ /; s/:/ /' "$file" | awk '{ for (i = 0; i < ($2 ? $2 : 1); i++) print $1 }'
}

requeue() {
    exit 75
}
