"""What became of a run, as one HTML page: read its folder, thin the curves, draw, put together."""
