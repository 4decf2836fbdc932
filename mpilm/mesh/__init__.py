"""The device mesh: coordinates of ranks as pure arithmetic, and a communicator for each set of axes."""
