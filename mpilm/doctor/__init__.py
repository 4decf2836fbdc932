"""The health of the ranks that mpirun starts, and a profile of their machine."""
