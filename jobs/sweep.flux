#!/bin/bash
# Start many runs that differ in a few settings:  jobs/submit jobs/sweep.flux sweep.txt --data.path my_tokens
# Line N of the file contains the flags of run N, such as --train.lr 3e-4 --model.n-layers 8, split at blanks even within
# quotes; the other arguments apply to all runs. Run N is in runs/FILE-N.
#FLUX: --job-name=mpilm-sweep
#FLUX: --nodes=1
#FLUX: --nslots=8
#FLUX: --cores-per-slot=4
#FLUX: --time-limit=240m
#FLUX: --output=mpilm-sweep-{{id}}.log
export MPILM_RANKS_PER_NODE=8 MPILM_CORES_PER_RANK=4
source "${MPILM_JOBS:-jobs}/common.sh" || { echo "use jobs/submit, or submit from the folder above jobs/" >&2; exit 78; }

sweep "$@"
