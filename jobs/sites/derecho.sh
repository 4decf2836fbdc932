# Derecho (NCAR): PBS; mpiexec of Cray PALS. Not run there.
# https://ncar-hpc-docs.readthedocs.io/en/latest/pbs/charging/ and https://github.com/NCAR/mpibind, read 2026-11-29.
# A node has 128 cores, and a job gets whole nodes.
# Flags for qsub: MPILM_FLAGS="-A PROJECT -q main -l select=2:ncpus=128:mpiprocs=8:ompthreads=16"
module load ncarenv cray-mpich
# --ppn is mpiprocs of `select`. Ranks that no launcher has bound bind themselves to even parts of the node.
export MPILM_MPIRUN="mpiexec --ppn 8 --cpu-bind none"
