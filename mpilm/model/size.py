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


def flops_by_part(model: Model, vocab_size: int) -> dict[str, int]:
    """Multiplications and additions of forward and backward for one token, of the embedding, one block, and norm, head and
    loss: 6 per matrix element, and the attention matrix of a causal context (Narayanan et al., arXiv 2104.04473, appendix)."""
    block = 6 * _block_matrices(model) + 6 * model.d_model * model.context_length
    return {"embed": 2 * model.d_model, "block": block, "head": 6 * vocab_size * model.d_model}


def flops_per_token(model: Model, vocab_size: int) -> int:
    """Multiplications and additions of forward and backward for one token, in matrices and attention."""
    parts = flops_by_part(model, vocab_size)
    return model.n_layers * parts["block"] + parts["head"]


def activation_bytes(
    model: Model, vocab_size: int, tokens: int, dtype: str, layers: int | None = None, first: bool = True,
    last: bool = True, recompute: str = "none",
) -> dict[str, int]:  # fmt: skip
    """What a microbatch of `tokens` tokens holds, for a part of the model: so many layers (None: all), the first with the
    embedding, the last with norm, head and loss.

    activations: kept for backward. again: of one block, while it is computed again. logits: twice, since their log-softmax is
    kept and their gradient comes. owed: inputs and gradients that weight gradients still need between the halves of a backward.
    """
    layers, width, half = model.n_layers if layers is None else layers, model.d_model, 0.5 if dtype == "bfloat16" else 1.0
    block, core = _block_floats(model, dtype)
    kept = {"none": block + core, "attention": block, "block": float(width)}[recompute]
    again = {"none": 0.0, "attention": core, "block": block + core}[recompute]
    ends = last * 3 * width + first * bool(model.dropout) * width
    owed = half * (layers * (6 * width + 2 * _kv_width(model) + 3 * model.d_ff) + last * (width + vocab_size))
    copies = copied_again = 0
    if dtype == "bfloat16":  # autocast keeps a copy of every matrix as long as a graph needs it
        copies = 2 * ((recompute != "block") * layers * _block_matrices(model) + last * vocab_size * width)
        copied_again = 2 * (recompute == "block") * _block_matrices(model)
    return {
        "activations": round(4 * tokens * (layers * kept + ends)) + copies,
        "again": round(4 * tokens * again) + copied_again,
        "logits": 8 * tokens * vocab_size * last,
        "owed": round(4 * tokens * owed),
    }


def _block_floats(model: Model, dtype: str) -> tuple[float, float]:
    """Floats a token that a block keeps for backward: outside and inside the core of attention."""
    width, kv, ff, heads = model.d_model, _kv_width(model), model.d_ff, model.n_heads
    half = 0.5 if dtype == "bfloat16" else 1.0
    block = 7.5 * width + kv + 2 * ff + 2 if dtype == "bfloat16" else 8.0 * width + 2 * kv + 4 * ff + 2
    if not model.dropout:
        return block, heads
    # attention written out: weights, mask and product, keys and values repeated; and a mask for each branch of the block
    return block + half * 2 * width, (1 + 2 * half) * heads * model.context_length + half * 2 * (width - kv)
