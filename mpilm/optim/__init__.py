"""Optimizers on flat parameters, the gradient norm, the same on every layout, and the learning-rate schedule."""
