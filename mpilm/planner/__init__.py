"""Predictions of step time and memory for parallel layouts, from the profile of a machine; without torch and MPI."""
