"""Sum gradients where the layout says; norm, clip, step."""
