#!/bin/bash
# Train on a cluster:  jobs/submit jobs/train.flux --data.path my_tokens --run.dir runs/first
# The arguments go to mpilm.train. Half a minute before the time limit the run saves, and the job submits itself again.
# Submitted again with the same arguments, it resumes too.
#FLUX: --job-name=mpilm-train
#FLUX: --nodes=2
#FLUX: --nslots=16
#FLUX: --cores-per-slot=4
#FLUX: --time-limit=240m
#FLUX: --output=mpilm-train-{{id}}.log
export MPILM_RANKS_PER_NODE=8 MPILM_CORES_PER_RANK=4
source "${MPILM_JOBS:-jobs}/common.sh" || { echo "use jobs/submit, or submit from the folder above jobs/" >&2; exit 78; }

train "$@"
