# Leonardo (CINECA): SLURM. Not run there.
# https://docs.hpc.cineca.it/hpc/hpc_cineca-ai-hpyc.html and https://docs.hpc.cineca.it/hpc/leonardo.html, read 2026-11-29:
# cineca-hpyc brings Python, mpi4py and Open MPI. Flags for sbatch: MPILM_FLAGS="-A PROJECT -p dcgp_usr_prod"
module load cineca-hpyc
