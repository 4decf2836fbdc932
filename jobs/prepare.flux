#!/bin/bash
# Turn text into token files:  jobs/submit jobs/prepare.flux --data.path texts/ --data.tokenizer bpe:32768 --output my_tokens
# The arguments go to mpilm.prepare. The files do not depend on the number of ranks.
#FLUX: --job-name=mpilm-prepare
#FLUX: --nodes=1
#FLUX: --nslots=16
#FLUX: --cores-per-slot=1
#FLUX: --time-limit=120m
#FLUX: --output=mpilm-prepare-{{id}}.log
export MPILM_RANKS_PER_NODE=16 MPILM_CORES_PER_RANK=1
source "${MPILM_JOBS:-jobs}/common.sh" || { echo "use jobs/submit, or submit from the folder above jobs/" >&2; exit 78; }

prepare "$@"
