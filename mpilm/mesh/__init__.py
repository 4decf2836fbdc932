"""Who am I: coordinates as pure arithmetic, and one communicator for each set of axes."""
