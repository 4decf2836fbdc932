"""Communication between ranks: one interface (base.py) over MPI, over torch.distributed, and for a single rank."""
