"""The table from our module names to Hugging Face's, and the search for them in a file."""

import re
from collections.abc import Iterable, Iterator

# Modules outside blocks, then those of a block without the number of the block, which "blocks" precedes.
LLAMA = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
MIXTRAL = LLAMA | {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.#.gate": "block_sparse_moe.experts.#.w1",
    "mlp.experts.#.up": "block_sparse_moe.experts.#.w3",
    "mlp.experts.#.down": "block_sparse_moe.experts.#.w2",
}
QWEN_MOE = LLAMA | {
    "mlp.router": "mlp.gate",
    **{f"mlp.experts.#.{matrix}": f"mlp.experts.#.{matrix}_proj" for matrix in ("gate", "up", "down")},
}
GPT2 = {
    "embed.tokens": "transformer.wte", "embed.positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
    "blocks": "transformer.h", "attn_norm": "ln_1", "mlp_norm": "ln_2",
    "attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
BERT = {
    "embed.tokens": "bert.embeddings.word_embeddings", "embed.positions": "bert.embeddings.position_embeddings",
    "embed.segments": "bert.embeddings.token_type_embeddings", "embed.norm": "bert.embeddings.LayerNorm",
    "norm.project": "cls.predictions.transform.dense", "norm.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions.decoder", "blocks": "bert.encoder.layer",
    "attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense", "attn_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
MODULE_NAMES = {"llama": LLAMA, "qwen": LLAMA, "mixtral": MIXTRAL, "qwen-moe": QWEN_MOE, "gpt2": GPT2, "bert": BERT}
PARAMETER_NAMES = {"cls.predictions.decoder.bias": "cls.predictions.bias"}  # the one that is not under the name of its module

LEGACY_KEYS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # BERT's, from TensorFlow
IGNORED_KEYS = re.compile(  # tensors of a file that are no parameters of a language model: buffers, and heads of other tasks
    r"(bert\.)?pooler\.|cls\.seq_relationship\.|cls\.predictions\.decoder\.bias$|(bert\.)?embeddings\.position_ids$"
    r"|(transformer\.)?h\.\d+\.attn\.(masked_)?bias$|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"
)


def hf_name(name: str, arch: str) -> str:
    """Return Hugging Face's name of a parameter, or PEFT's name if the parameter is an adapter's."""
    if ".lora." in name:
        matrix, _, part = name.removesuffix(".weight").partition(".lora.")
        return f"base_model.model.{hf_module_name(matrix, arch)}.lora_{part.upper()}.weight"
    module, _, kind = name.rpartition(".")
    full = f"{hf_module_name(module, arch)}.{kind}"
    return PARAMETER_NAMES.get(full, full)


def hf_module_name(name: str, arch: str) -> str:
    """Return Hugging Face's name of a module."""
    names, numbers, key = MODULE_NAMES[arch], iter(re.findall(r"\.(\d+)\.", name)), re.sub(r"\.\d+\.", ".#.", name)
    part = key.removeprefix("blocks.#.")
    full = names[key] if part == key else f"{names['blocks']}.#.{names[part]}"
    return re.sub("#", lambda _: next(numbers), full)


def match_keys(
    parameters: Iterable[str], keys: Iterable[str], arch: str, tied: Iterable[str]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the key of each of our `parameters` in a file, which may lack the prefix of the whole model or use legacy keys;
    Hugging Face's names of those that it lacks; and keys that the model has no use for. The `tied` may be there as well."""
    available = set(keys)
    found = {name: next((key for key in _possible_keys(name, arch) if key in available), "") for name in parameters}
    copies = {key for name in tied for key in _possible_keys(name, arch)}
    unexpected = sorted(key for key in available - set(found.values()) - copies if not IGNORED_KEYS.match(key))
    return found, [hf_name(name, arch) for name, key in found.items() if not key], unexpected


def _possible_keys(name: str, arch: str) -> Iterator[str]:
    full = hf_name(name, arch)
    for key in (full, full.split(".", 1)[1]):
        yield key
        for new, legacy in LEGACY_KEYS:
            if new in key:
                yield key.replace(new, legacy)
