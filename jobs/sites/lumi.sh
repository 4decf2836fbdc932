# LUMI-C (CSC): SLURM. Not run there.
# https://docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/lumic-job/ and
# https://docs.lumi-supercomputer.eu/software/installing/python/, read 2026-11-29: srun instead of mpirun; the mpi4py of
# cray-python is built against Cray MPICH (make the environment with --system-site-packages).
# Flags for sbatch: MPILM_FLAGS="-A project_ID -p standard --mem=0"
module load LUMI cray-python
