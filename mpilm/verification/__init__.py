"""Proof, on the machine at hand, that every layout gives the same bits."""
