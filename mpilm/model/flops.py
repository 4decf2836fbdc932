"""The size of a model by arithmetic: parameters, floating-point operations, activations. Pure.

The activation counts are what torch saves for backward; a test compares them with its saved tensors. "Floats" are units of
4 bytes: a bfloat16 value is half a float.
"""

from dataclasses import replace

from mpilm.config.schema import GPT2_STYLE, LORA_TARGETS, MIXTURES, QWEN_STYLE, ModelConfig


def model_part(model: ModelConfig, parts: int) -> ModelConfig:
    """Return the model with the share of one of `parts` tensor parts: of the heads and of the feed-forward width."""
    heads, kv_heads, d_ff = (size // parts for size in (model.n_heads, model.n_kv_heads, model.d_ff))
    return replace(model, n_heads=heads, n_kv_heads=kv_heads, d_ff=d_ff)


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters; a tied matrix counts once."""
    return stage_numel(model, vocab_size, model.n_layers) - vocab_size * model.d_model * model.tie_embeddings


def stage_numel(model: ModelConfig, vocab_size: int, layers: int, first: bool = True, last: bool = True) -> int:
    """Return the number of gradient elements of a pipeline stage; both uses of a tied matrix count."""
    embedding, head = embedding_and_head_numel(model, vocab_size)
    return layers * block_numel(model) + first * embedding + last * head


def block_numel(model: ModelConfig) -> int:
    """Return the number of parameters of one block: matrices, two norms, biases, and norms inside attention."""
    queries, keys = _attention_widths(model)
    if model.arch in GPT2_STYLE:
        return _matrix_numel(model) + queries + 2 * keys + 6 * model.d_model + model.d_ff
    vectors = 2 * model.d_model
    if model.arch in QWEN_STYLE:
        vectors += 2 * model.head_width if model.qk_norm else queries + 2 * keys
    return _matrix_numel(model) + vectors


def embedding_and_head_numel(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Return the parameters of the embedding, and of norm and head; a tied matrix counts in both, with a gradient each."""
    width, positions, matrix = model.d_model, model.context_length * model.d_model, vocab_size * model.d_model
    if model.arch == "bert":  # positions, two segments, norm; projection, its bias and norm, output matrix and bias
        return matrix + positions + 4 * width, matrix + width * width + 3 * width + vocab_size
    return (matrix + positions, matrix + 2 * width) if model.arch == "gpt2" else (matrix, matrix + width)


def block_matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return the matrices of a block: (width in, width out, number of equal ones, of which a token uses some)."""
    width, (queries, keys), ff = model.d_model, _attention_widths(model), model.d_ff
    if model.arch == "gpt2":
        attention = [(width, queries + 2 * keys, 1), (queries, width, 1)]
    else:
        attention = [(width, queries, 1), (width, keys, 1), (width, keys, 1), (queries, width, 1)]
    if model.arch in GPT2_STYLE:
        return [*attention, (width, ff, 1), (ff, width, 1)]
    if model.arch in MIXTURES:
        experts = [(width, ff, model.n_experts)] * 2 + [(ff, width, model.n_experts)]
        return [*attention, (width, model.n_experts, 1), *experts]
    return [*attention, (width, ff, 1), (width, ff, 1), (ff, width, 1)]


def experts_numel(model: ModelConfig) -> int:
    """Return the parameters of all experts of a block."""
    return 3 * model.d_model * model.d_ff * model.n_experts


def _matrix_numel(model: ModelConfig, experts: int | None = None) -> int:
    """Return the elements of a block's matrices, counting at most that many experts."""
    return sum(a * b * (min(count, experts) if experts else count) for a, b, count in block_matrices(model))


def _attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Return the width of all query heads and of all key heads."""
    return model.n_heads * model.head_width, model.n_kv_heads * model.head_width


def flops_by_part(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Return the floating-point operations of forward and backward for one token: of the embedding, of a block, and of head and
    loss. They are 6 per matrix element that the token uses, and those of attention (Narayanan et al., arXiv 2104.04473)."""
    block = 6 * _matrix_numel(model, experts=model.experts_per_token) + attention_flops_per_token(model)
    head = vocab_size * model.d_model + (model.d_model**2 if model.arch == "bert" else 0)
    return {"embed": 2 * model.d_model, "block": block, "head": 6 * head}


def attention_flops_per_token(model: ModelConfig) -> int:
    """Return those of a block's attention core for one token, a third of them in forward; a causal mask halves them."""
    visible = 2 if model.arch == "bert" else 1
    return 6 * visible * _attention_widths(model)[0] * model.context_length


def flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Return the floating-point operations of forward and backward for one token, in matrices and attention."""
    parts = flops_by_part(model, vocab_size)
    return model.n_layers * parts["block"] + parts["head"]


def activation_bytes(
    model: ModelConfig, vocab_size: int, tokens: int, dtype: str, layers: int | None = None, first: bool = True,
    last: bool = True, recompute: str = "none", tensor: int = 1, parts: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes that a microbatch of `tokens` tokens needs in part of a model: `layers` blocks (None: all), with the
    embedding if `first`, and with norm, head and loss if `last`. The bytes are those of each of `tensor` ranks, which divide a
    model of `parts` tensor parts.

    activations: saved for backward
    recompute: of the block that backward is recomputing
    logits: twice, because their log-softmax is saved and their gradient follows
    split_backward: inputs and gradients that weight gradients still need between the halves of a split backward
    """
    layers, width, half = model.n_layers if layers is None else layers, model.d_model, 1.0 if dtype == "float32" else 0.5
    block, core = _block_floats(model, half, 0 if tensor > 1 else parts)
    block += (parts - 1) * _routed_floats(model, half) * (model.arch in MIXTURES)  # each part saves the tokens of its experts
    saved = {"none": block + core, "attention": block, "block": float(width)}[recompute]
    recomputed = {"none": 0.0, "attention": core, "block": block + core}[recompute]
    head = {"gpt2": 1 + half, "bert": 4 * half}.get(model.arch, 2 + half)  # of the last norm, and the input of the matrix
    embedding = bool(model.dropout) + (model.arch == "bert")
    split_backward = half * (layers * _split_backward_floats(model) + last * (width + vocab_size))
    head_numel = vocab_size * width + (width * width if model.arch == "bert" else 0)
    copy = 2 * (dtype != "float32")  # bytes per element: autocast keeps a copy of every matrix as long as a graph needs it
    saved_copies = copy * ((recompute != "block") * layers * _matrix_numel(model) + last * head_numel)
    recomputed_copies = copy * (recompute == "block") * _matrix_numel(model)
    nbytes = {
        "activations": 4 * tokens * (layers * saved + (last * head + first * embedding) * width) + saved_copies,
        "recompute": 4 * tokens * recomputed + recomputed_copies,
        "logits": 8 * tokens * vocab_size * last,
        "split_backward": 4 * tokens * split_backward,
    }
    return {part: round(number / tensor) for part, number in nbytes.items()}


def saved_floats_per_token(model: ModelConfig, dtype: str) -> float:
    """Return the floats per token that a block saves for backward."""
    return sum(_block_floats(model, 1.0 if dtype == "float32" else 0.5))


def _block_floats(model: ModelConfig, half: float, parts: int = 1) -> tuple[float, float]:
    """Return the floats per token that a block saves for backward on all ranks, outside and inside the attention core. `parts`:
    tensor parts that keep bfloat16 copies of their input; 0 if a rank keeps one for all."""
    width, (queries, keys), heads = model.d_model, _attention_widths(model), model.n_heads
    layer_norm, rms_norm = width + 2, 2 * width + 1  # input, mean and deviation; input, deviation and normalised input
    norm = layer_norm if model.arch in GPT2_STYLE else rms_norm
    block = 2 * norm + _input_floats(model, half, (1 if model.arch == "gpt2" else 3) * parts or 1)
    block += half * (2 * queries + 2 * keys) + _feed_forward_floats(model, half, parts)
    if model.qk_norm and model.arch in QWEN_STYLE:
        block += 2 * (queries + keys) + heads + model.n_kv_heads
    if model.lora_rank:  # between an adapter's two matrices; its input is saved without it too
        block += half * model.lora_rank * len(model.lora_targets or LORA_TARGETS[model.arch])
    if not model.dropout:
        return block, heads
    # Explicit attention: weights, mask and product, keys and values repeated. And a mask for each branch of the block.
    return block + half * 2 * width, (1 + 2 * half) * heads * model.context_length + half * 2 * (queries - keys)


def _input_floats(model: ModelConfig, half: float, matrices: int) -> float:
    """Return the floats of one input of so many matrices: autocast makes a copy for each."""
    return model.d_model * (1 if half == 1.0 else half * matrices)


def _feed_forward_floats(model: ModelConfig, half: float, parts: int) -> float:
    if model.arch in GPT2_STYLE:
        return _input_floats(model, half, parts or 1) + half * 2 * model.d_ff
    gated = half * 4 * model.d_ff
    if model.arch not in MIXTURES:
        return _input_floats(model, half, 2 * parts or 1) + gated
    return _input_floats(model, half, 1) + model.n_experts + model.experts_per_token * gated + _routed_floats(model, half)


def _routed_floats(model: ModelConfig, half: float) -> float:
    """Return the floats per token that the inputs and outputs of its experts need."""
    return model.experts_per_token * (_input_floats(model, half, 2) + (1 + half) * model.d_model + 8)


def _split_backward_floats(model: ModelConfig) -> float:
    """Return the elements per token of the inputs of a block's matrices and of the gradients of their outputs."""
    width, (queries, keys) = model.d_model, _attention_widths(model)
    feed_forward = 2 * width + (2 if model.arch in GPT2_STYLE else 3) * model.d_ff
    if model.arch in MIXTURES:
        feed_forward = width + model.n_experts + model.experts_per_token * feed_forward
    return 2 * (width + queries + keys) + feed_forward
