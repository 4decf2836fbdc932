# Polaris (ALCF): PBS; mpiexec of Cray PALS. Not run there.
# https://docs.alcf.anl.gov/polaris/running-jobs/ and https://docs.alcf.anl.gov/polaris/data-science/python/, read 2026-11-29.
# Flags for qsub: MPILM_FLAGS="-A PROJECT -q prod -l filesystems=home:eagle"
module use /soft/modulefiles
module load conda
conda activate base
# --ppn is mpiprocs of `select`, --depth the hardware threads between two ranks: ompthreads.
export MPILM_MPIRUN="mpiexec --ppn 8 --depth 4 --cpu-bind depth"
