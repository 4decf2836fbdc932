# HTCondor, parallel universe: this script runs on every node. sshd.sh, which HTCondor brings, starts an sshd on each and lists
# them in a contact file; node 0 then starts the ranks by ssh, and the others wait. SIGTERM comes when the job is evicted, which
# returns it to the queue, or removed. Exit code 99 returns it, too.
job=$(sed -n 's/^ClusterId = //p' "$_CONDOR_JOB_AD")
restarts=$(($(sed -n 's/^NumJobStarts = //p' "$_CONDOR_JOB_AD") + 0))
libexec=$(condor_config_val libexec)
contacts=$_CONDOR_SCRATCH_DIR/contact
set +eu
source "$libexec/sshd.sh" "$_CONDOR_PROCNO" "$_CONDOR_NPROCS"
set -eu
if [ "$_CONDOR_PROCNO" != 0 ]; then
    wait
    sshd_cleanup
    exit 0
fi
export CONDOR_CONTACT_FILE=$contacts # condor_ssh reads it
export OMPI_MCA_plm_rsh_agent=$libexec/condor_ssh PRTE_MCA_plm_ssh_agent=$libexec/condor_ssh
export HYDRA_LAUNCHER=ssh HYDRA_LAUNCHER_EXEC=$libexec/condor_ssh

# The contact file has a node and its host in each line; MPILM_RANKS_PER_NODE ranks run on each.
list_hosts() {
    sort -n "$contacts" | awk '{ print $2 }' | repeat_lines "${MPILM_RANKS_PER_NODE:-1}"
}

requeue() {
    exit 99
}

clean_up() {
    sshd_cleanup
}
