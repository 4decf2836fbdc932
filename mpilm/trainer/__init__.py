"""Training runs: built, looped, logged, saved, recovered."""
