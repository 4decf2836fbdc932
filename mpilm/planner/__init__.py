"""What a layout will take of memory and time, from a calibration of the machine: pure arithmetic, without torch and MPI."""
