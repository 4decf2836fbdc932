"""Optimizers on flat parameters, the exact gradient norm, and the learning-rate schedule."""
