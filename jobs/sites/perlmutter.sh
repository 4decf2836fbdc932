# Perlmutter (NERSC): SLURM. Not run there.
# https://docs.nersc.gov/jobs/ and https://libensemble.readthedocs.io/en/latest/platforms/perlmutter.html, read 2026-11-29.
# Build mpi4py against Cray MPICH: MPICC="cc -shared" pip install --no-cache-dir --no-binary=mpi4py mpi4py
# Flags for sbatch: MPILM_FLAGS="-A PROJECT -C cpu -q regular"
module load PrgEnv-gnu python
