"""How large a model is: parameters, floating-point operations, activations. Pure arithmetic.

The activation counts are what torch keeps for backward, checked by a test against its saved tensors.
"""

from __future__ import annotations

from mpilm.config import LORA_TARGETS, Model


def parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters that have memory of their own."""
    width, norm = model.d_model, _norm(model)
    ends = {"gpt2": model.context_length * width, "bert": _bert_ends(model, vocab_size)}.get(model.arch, 0)
    return model.n_layers * block_numel(model) + norm + ends + vocab_size * width * (1 if model.tie_embeddings else 2)


def block_numel(model: Model) -> int:
    """Parameters of one block."""
    return _matrices(model) + _vectors(model) + 2 * _norm(model)


def ends_numel(model: Model, vocab_size: int) -> tuple[int, int]:
    """Parameters of the embedding, and of norm and head; a tied matrix counts in both, which have a gradient each."""
    matrix = vocab_size * model.d_model
    last = matrix + _norm(model)
    if model.arch == "bert":  # a projection, its norm and bias, and the bias of the logits; the entry has a norm as well
        width = model.d_model
        return matrix + (model.context_length + 2) * width + 2 * width, matrix + width * width + 3 * width + vocab_size
    return matrix + model.context_length * model.d_model * (model.arch == "gpt2"), last


def _bert_ends(model: Model, vocab_size: int) -> int:
    """Positions, two segments and a norm at the entry; a projection and the bias of the logits at the exit."""
    width = model.d_model
    return (model.context_length + 2) * width + 2 * width + width * width + width + vocab_size


def _norm(model: Model) -> int:
    return model.d_model * (2 if _biased(model) else 1)


def _biased(model: Model) -> bool:
    return model.arch in ("gpt2", "bert")


def _widths(model: Model) -> tuple[int, int]:
    """Of all queries together, and of all keys."""
    return model.n_heads * model.head_width, model.n_kv_heads * model.head_width


def matrices(model: Model) -> list[tuple[int, int, int]]:
    """The matrices of a block: their two sides, and how many alike there are, of which a token meets some (experts)."""
    width, (queries, keys), ff = model.d_model, _widths(model), model.d_ff
    if model.arch == "gpt2":
        attention = [(width, queries + 2 * keys, 1), (queries, width, 1)]
    else:
        attention = [(width, queries, 1), (width, keys, 1), (width, keys, 1), (queries, width, 1)]
    if _biased(model):
        return [*attention, (width, ff, 1), (ff, width, 1)]
    if model.arch == "mixtral":
        experts = [(width, ff, model.n_experts)] * 2 + [(ff, width, model.n_experts)]
        return [*attention, (width, model.n_experts, 1), *experts]
    return [*attention, (width, ff, 1), (width, ff, 1), (ff, width, 1)]


def _matrices(model: Model, experts: int | None = None) -> int:
    """Elements of the matrices of a block; of so many experts, where not all count."""
    return sum(a * b * (min(alike, experts) if experts else alike) for a, b, alike in matrices(model))


def _vectors(model: Model) -> int:
    """Elements of a block's biases, and of norms inside its attention."""
    queries, keys = _widths(model)
    if model.arch == "qwen":
        return 2 * model.head_width if model.qk_norm else queries + 2 * keys
    return 5 * model.d_model + model.d_ff if _biased(model) else 0


def flops_by_part(model: Model, vocab_size: int) -> dict[str, int]:
    """Multiplications and additions of forward and backward for one token, of the embedding, one block, and norm, head and
    loss: 6 per matrix element that a token meets, and the attention matrix, of which a causal context leaves half (Narayanan
    et al., arXiv 2104.04473, appendix)."""
    block = 6 * _matrices(model, experts=model.experts_per_token) + attention_flops(model)
    head = vocab_size * model.d_model + (model.d_model**2 if model.arch == "bert" else 0)
    return {"embed": 2 * model.d_model, "block": block, "head": 6 * head}


def attention_flops(model: Model) -> int:
    """Of the core of attention, for one token of one block; a third of it in forward."""
    seen = 2 if model.arch == "bert" else 1
    return 6 * seen * _widths(model)[0] * model.context_length


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
    block, core = _block_floats(model, half)
    kept = {"none": block + core, "attention": block, "block": float(width)}[recompute]
    again = {"none": 0.0, "attention": core, "block": block + core}[recompute]
    exits = {"gpt2": 1 + half, "bert": 4 * half}.get(model.arch, 2 + half)  # of the last norm, and the input of the matrix
    entries = bool(model.dropout) + (model.arch == "bert")
    owed = half * (layers * _owed_floats(model) + last * (width + vocab_size))
    copies = copied_again = 0
    if dtype == "bfloat16":  # autocast keeps a copy of every matrix as long as a graph needs it
        head = vocab_size * width + (width * width if model.arch == "bert" else 0)
        copies = 2 * ((recompute != "block") * layers * _matrices(model) + last * head)
        copied_again = 2 * (recompute == "block") * _matrices(model)
    return {
        "activations": round(4 * tokens * (layers * kept + (last * exits + first * entries) * width)) + copies,
        "again": round(4 * tokens * again) + copied_again,
        "logits": 8 * tokens * vocab_size * last,
        "owed": round(4 * tokens * owed),
    }


def kept_floats(model: Model, dtype: str) -> float:
    """Floats a token that a block keeps for backward."""
    return sum(_block_floats(model, 0.5 if dtype == "bfloat16" else 1.0))


def _block_floats(model: Model, half: float) -> tuple[float, float]:
    """Floats a token that a block keeps for backward: outside and inside the core of attention. `half`: size of a product."""
    width, (queries, keys), heads = model.d_model, _widths(model), model.n_heads
    block = 2 * _norm_floats(model) + _input_floats(model, half, 1 if model.arch == "gpt2" else 3)
    block += half * (2 * queries + 2 * keys) + _feed_forward_floats(model, half)
    if model.qk_norm and model.arch == "qwen":
        block += 2 * (queries + keys) + heads + model.n_kv_heads
    if model.lora_rank:  # between its two matrices; what comes in is kept as it is without
        block += half * model.lora_rank * len(model.lora_targets or LORA_TARGETS[model.arch])
    if not model.dropout:
        return block, heads
    # attention written out: weights, mask and product, keys and values repeated; and a mask for each branch of the block
    return block + half * 2 * width, (1 + 2 * half) * heads * model.context_length + half * 2 * (queries - keys)


def _norm_floats(model: Model) -> int:
    """What a norm keeps, its output left out: LayerNorm its input, mean and deviation; RMSNorm also what it has divided."""
    return model.d_model + 2 if _biased(model) else 2 * model.d_model + 1


def _input_floats(model: Model, half: float, matrices: int) -> float:
    """The one input of so many matrices, of which each keeps a copy of its own where autocast makes one."""
    return model.d_model * (1 if half == 1.0 else half * matrices)


def _feed_forward_floats(model: Model, half: float) -> float:
    if _biased(model):
        return _input_floats(model, half, 1) + half * 2 * model.d_ff
    expert = _input_floats(model, half, 2) + half * 4 * model.d_ff
    if model.arch != "mixtral":
        return expert
    chosen = model.experts_per_token
    return _input_floats(model, half, 1) + model.n_experts + chosen * (expert + (1 + half) * model.d_model + 8)


def _owed_floats(model: Model) -> float:
    """Inputs of a block's matrices and gradients of their outputs."""
    width, (queries, keys), ff = model.d_model, _widths(model), model.d_ff
    attention = 2 * width + 2 * queries + 2 * keys
    if _biased(model):
        return attention + 2 * width + 2 * ff
    if model.arch != "mixtral":
        return attention + 2 * width + 3 * ff
    return attention + width + model.n_experts + model.experts_per_token * (2 * width + 3 * ff)
