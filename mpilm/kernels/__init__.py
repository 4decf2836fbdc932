"""The operations between the matrix products of a model: torch's (base.py), and fused ones that numba compiles for CPUs."""

LOSS_BLOCK = 1 << 20  # logits whose cross-entropies are computed together: 4 MiB
MAX_LOGITS = 1 << 26  # of a microbatch, that are kept whole from forward to backward: 256 MiB in float32
LOGITS_BLOCK = 1 << 24  # of more than those, as many are computed at a time
