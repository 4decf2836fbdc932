"""The doctor's --calibrate: how long this machine takes for each thing that a training step is made of."""
