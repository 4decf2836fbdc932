"""The table from our module names to Hugging Face's, and the search for them in a file."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

LLAMA = {
    "embed": "model.embed_tokens",
    "blocks.#.attn_norm": "model.layers.#.input_layernorm",
    "blocks.#.attn.q": "model.layers.#.self_attn.q_proj",
    "blocks.#.attn.k": "model.layers.#.self_attn.k_proj",
    "blocks.#.attn.v": "model.layers.#.self_attn.v_proj",
    "blocks.#.attn.o": "model.layers.#.self_attn.o_proj",
    "blocks.#.attn.q_norm": "model.layers.#.self_attn.q_norm",
    "blocks.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
    "blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp.gate": "model.layers.#.mlp.gate_proj",
    "blocks.#.mlp.up": "model.layers.#.mlp.up_proj",
    "blocks.#.mlp.down": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
MIXTRAL = LLAMA | {
    "blocks.#.mlp.router": "model.layers.#.block_sparse_moe.gate",
    "blocks.#.mlp.experts.#.gate": "model.layers.#.block_sparse_moe.experts.#.w1",
    "blocks.#.mlp.experts.#.up": "model.layers.#.block_sparse_moe.experts.#.w3",
    "blocks.#.mlp.experts.#.down": "model.layers.#.block_sparse_moe.experts.#.w2",
}
QWEN_MOE = LLAMA | {
    "blocks.#.mlp.router": "model.layers.#.mlp.gate",
    "blocks.#.mlp.experts.#.gate": "model.layers.#.mlp.experts.#.gate_proj",
    "blocks.#.mlp.experts.#.up": "model.layers.#.mlp.experts.#.up_proj",
    "blocks.#.mlp.experts.#.down": "model.layers.#.mlp.experts.#.down_proj",
}
GPT2 = {
    "embed.tokens": "transformer.wte",
    "embed.positions": "transformer.wpe",
    "blocks.#.attn_norm": "transformer.h.#.ln_1",
    "blocks.#.attn.qkv": "transformer.h.#.attn.c_attn",
    "blocks.#.attn.o": "transformer.h.#.attn.c_proj",
    "blocks.#.mlp_norm": "transformer.h.#.ln_2",
    "blocks.#.mlp.up": "transformer.h.#.mlp.c_fc",
    "blocks.#.mlp.down": "transformer.h.#.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
BERT = {
    "embed.tokens": "bert.embeddings.word_embeddings",
    "embed.positions": "bert.embeddings.position_embeddings",
    "embed.segments": "bert.embeddings.token_type_embeddings",
    "embed.norm": "bert.embeddings.LayerNorm",
    "blocks.#.attn.q": "bert.encoder.layer.#.attention.self.query",
    "blocks.#.attn.k": "bert.encoder.layer.#.attention.self.key",
    "blocks.#.attn.v": "bert.encoder.layer.#.attention.self.value",
    "blocks.#.attn.o": "bert.encoder.layer.#.attention.output.dense",
    "blocks.#.attn_norm": "bert.encoder.layer.#.attention.output.LayerNorm",
    "blocks.#.mlp.up": "bert.encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.down": "bert.encoder.layer.#.output.dense",
    "blocks.#.mlp_norm": "bert.encoder.layer.#.output.LayerNorm",
    "norm.project": "cls.predictions.transform.dense",
    "norm.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions.decoder",
}
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
    numbers = iter(re.findall(r"\.(\d+)\.", name))
    return re.sub("#", lambda _: next(numbers), MODULE_NAMES[arch][re.sub(r"\.\d+\.", ".#.", name)])


@dataclass(frozen=True)
class KeyMatch:
    """The result of looking for parameters in a file."""

    names: Mapping[str, str]  # parameter -> the key that the file has it under
    missing: tuple[str, ...]  # Hugging Face's names of parameters that the file lacks
    unexpected: tuple[str, ...]  # keys that the model has no use for


def match_keys(parameters: Iterable[str], keys: Iterable[str], arch: str, tied: Iterable[str] = ()) -> KeyMatch:
    """Find each of our `parameters` among the keys of a file, which may lack the prefix of the whole model or use legacy keys.
    Parameters that are `tied` may be in the file as well."""
    available = set(keys)
    found = {name: next((key for key in _possible_keys(name, arch) if key in available), "") for name in parameters}
    copies = {key for name in tied for key in _possible_keys(name, arch)}
    unexpected = sorted(key for key in available - set(found.values()) - copies if not IGNORED_KEYS.match(key))
    return KeyMatch(found, tuple(hf_name(name, arch) for name, key in found.items() if not key), tuple(unexpected))


def _possible_keys(name: str, arch: str) -> Iterator[str]:
    full = hf_name(name, arch)
    for key in (full, full.split(".", 1)[1]):
        yield key
        for new, legacy in LEGACY_KEYS:
            if new in key:
                yield key.replace(new, legacy)
