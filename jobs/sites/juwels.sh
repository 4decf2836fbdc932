# JUWELS (JSC): SLURM, whose srun starts the ranks through psid. Not run there.
# https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html and https://apps.fz-juelich.de/jsc/hps/jureca/affinity.html,
# read 2026-11-29. Flags for sbatch: MPILM_FLAGS="--account=PROJECT --partition=batch"
module load GCC ParaStationMPI Python
