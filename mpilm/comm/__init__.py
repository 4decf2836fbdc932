"""Communication between ranks: one interface (base.py) over MPI, over threads, and for a single rank."""
