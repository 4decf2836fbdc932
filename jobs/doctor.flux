#!/bin/bash
# Check that this cluster is fit to train on:  jobs/submit jobs/doctor.flux
# --drill kill kills a rank at the end: the job must then end within seconds, with a code other than 0.
#FLUX: --job-name=mpilm-doctor
#FLUX: --nodes=2
#FLUX: --nslots=16
#FLUX: --cores-per-slot=4
#FLUX: --time-limit=10m
#FLUX: --output=mpilm-doctor-{{id}}.log
export MPILM_RANKS_PER_NODE=8 MPILM_CORES_PER_RANK=4
source "${MPILM_JOBS:-jobs}/common.sh" || { echo "use jobs/submit, or submit from the folder above jobs/" >&2; exit 78; }

doctor "$@"
