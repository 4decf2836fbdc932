# Fugaku (RIKEN): its scheduler is Fujitsu's (pjsub), for which there is no batch script here; a script of your own sources this
# file and starts `$MPILM_MPIRUN -n RANKS python -m mpilm.train ... --run.time-limit SECONDS`. Not run there.
# https://www.r-ccs.riken.jp/fugaku/docs/user-guide/sys-use/user-guide-use-1.50/build/en/, read 2026-11-29.
# Software comes from Spack: `pjsub -x PJM_LLIO_GFSCACHE=/vol0004`, then `spack load` the Python of the compute nodes.
. /vol0004/apps/oss/spack/share/spack/setup-env.sh
export LD_LIBRARY_PATH=/lib64:${LD_LIBRARY_PATH:-}
export MPILM_MPIRUN=mpiexec
