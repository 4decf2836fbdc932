"""Build, step, loop, evaluate."""
