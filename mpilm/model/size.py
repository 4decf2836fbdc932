"""How large a model is: parameters, floating-point operations, activations. Pure arithmetic.

The activation counts are what torch keeps for backward, checked by a test against its saved tensors.
"""

from __future__ import annotations

from mpilm.config import Model


def parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters that have memory of their own."""
    embedding = vocab_size * model.d_model
    return model.n_layers * _block_parameters(model) + model.d_model + embedding * (1 if model.tie_embeddings else 2)


def _block_parameters(model: Model) -> int:
    return _block_matrices(model) + 2 * model.d_model


def _block_matrices(model: Model) -> int:
    width = model.d_model
    return 2 * width * (width + _kv_width(model)) + 3 * width * model.d_ff


def _kv_width(model: Model) -> int:
    return model.d_model // model.n_heads * model.n_kv_heads


def flops_per_token(model: Model, vocab_size: int) -> int:
    """Multiplications and additions of forward and backward for one token: 6 per matrix element, and the attention
    matrix of a causal context (Narayanan et al., arXiv 2104.04473, appendix)."""
    matrices = model.n_layers * _block_matrices(model) + vocab_size * model.d_model
    return 6 * matrices + 6 * model.n_layers * model.d_model * model.context_length


def activation_bytes(model: Model, vocab_size: int, tokens: int, dtype: str) -> dict[str, int]:
    """The most a microbatch of `tokens` tokens holds at once: what the blocks keep for backward, and the logits twice
    (their log-softmax is kept, their gradient comes)."""
    width, kv, ff, heads = model.d_model, _kv_width(model), model.d_ff, model.n_heads
    if dtype == "bfloat16":  # halves are bf16; autocast keeps a bf16 copy of every matrix until the step is done
        block = 7.5 * width + kv + 2 * ff + heads + 2
        copies = 2 * (model.n_layers * _block_matrices(model) + vocab_size * width)
    else:
        block = 8.0 * width + 2 * kv + 4 * ff + heads + 2
        copies = 0
    if model.dropout:  # attention written out: weights, mask, product, keys and values repeated; and a mask for each branch
        half = 0.5 if dtype == "bfloat16" else 1.0
        block += (1 + 2 * half) * heads * model.context_length + half * (2 * width + 2 * (width - kv)) - heads
    kept = 4 * tokens * (model.n_layers * block + (4 if model.dropout else 3) * width)
    return {"activations": round(kept) + copies, "logits": 8 * tokens * vocab_size}
