# Frontier (OLCF): SLURM. Not run there.
# https://docs.olcf.ornl.gov/software/python/parallel_h5py.html and https://docs.olcf.ornl.gov/systems/frontier_user_guide.html,
# read 2026-11-29. Build mpi4py against Cray MPICH: MPICC="cc -shared" pip install --no-cache-dir --no-binary=mpi4py mpi4py
module load PrgEnv-gnu miniforge3
# srun is Cray's own launcher. A node has 64 cores; 8 are reserved for the system: MPILM_FLAGS="-A PROJECT --cpus-per-task=7"
