"""Recovery from bad steps, failing memory and lost ranks."""
