"""The two-way table between our parameter names and Hugging Face's. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

LLAMA = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.#.attn_norm.weight": "model.layers.#.input_layernorm.weight",
    "blocks.#.attn.q.weight": "model.layers.#.self_attn.q_proj.weight",
    "blocks.#.attn.k.weight": "model.layers.#.self_attn.k_proj.weight",
    "blocks.#.attn.v.weight": "model.layers.#.self_attn.v_proj.weight",
    "blocks.#.attn.o.weight": "model.layers.#.self_attn.o_proj.weight",
    "blocks.#.mlp_norm.weight": "model.layers.#.post_attention_layernorm.weight",
    "blocks.#.mlp.gate.weight": "model.layers.#.mlp.gate_proj.weight",
    "blocks.#.mlp.up.weight": "model.layers.#.mlp.up_proj.weight",
    "blocks.#.mlp.down.weight": "model.layers.#.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
QWEN = LLAMA | {
    "blocks.#.attn.q.bias": "model.layers.#.self_attn.q_proj.bias",
    "blocks.#.attn.k.bias": "model.layers.#.self_attn.k_proj.bias",
    "blocks.#.attn.v.bias": "model.layers.#.self_attn.v_proj.bias",
    "blocks.#.attn.q_norm.weight": "model.layers.#.self_attn.q_norm.weight",
    "blocks.#.attn.k_norm.weight": "model.layers.#.self_attn.k_norm.weight",
}
MIXTRAL = LLAMA | {
    "blocks.#.mlp.router.weight": "model.layers.#.block_sparse_moe.gate.weight",
    "blocks.#.mlp.experts.#.gate.weight": "model.layers.#.block_sparse_moe.experts.#.w1.weight",
    "blocks.#.mlp.experts.#.up.weight": "model.layers.#.block_sparse_moe.experts.#.w3.weight",
    "blocks.#.mlp.experts.#.down.weight": "model.layers.#.block_sparse_moe.experts.#.w2.weight",
}


def _with_biases(table: Mapping[str, str]) -> dict[str, str]:
    """The table, whose names lack the last word, for weights and for biases."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in table.items() for part in ("weight", "bias")}


GPT2 = {
    "embed.tokens.weight": "transformer.wte.weight",
    "embed.positions.weight": "transformer.wpe.weight",
    "head.weight": "lm_head.weight",
} | _with_biases(
    {
        "blocks.#.attn_norm": "transformer.h.#.ln_1",
        "blocks.#.attn.qkv": "transformer.h.#.attn.c_attn",
        "blocks.#.attn.o": "transformer.h.#.attn.c_proj",
        "blocks.#.mlp_norm": "transformer.h.#.ln_2",
        "blocks.#.mlp.up": "transformer.h.#.mlp.c_fc",
        "blocks.#.mlp.down": "transformer.h.#.mlp.c_proj",
        "norm": "transformer.ln_f",
    }
)
BERT = {
    "embed.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embed.positions.weight": "bert.embeddings.position_embeddings.weight",
    "embed.segments.weight": "bert.embeddings.token_type_embeddings.weight",
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": "cls.predictions.bias",
} | _with_biases(
    {
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
    }
)
NAMES = {"llama": LLAMA, "qwen": QWEN, "mixtral": MIXTRAL, "gpt2": GPT2, "bert": BERT}

OLD_WORDS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # of BERT, as TensorFlow had them
BESIDE = re.compile(  # what files hold beside the parameters of a language model: buffers, and heads of other tasks
    r"(bert\.)?pooler\.|cls\.seq_relationship\.|cls\.predictions\.decoder\.bias$|(bert\.)?embeddings\.position_ids$"
    r"|(transformer\.)?h\.\d+\.attn\.(masked_)?bias$|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"
)


def published_name(name: str, arch: str) -> str:
    """Our name of a parameter of a family to Hugging Face's; of an adapter's, to PEFT's."""
    if ".lora." in name:
        matrix, _, part = name.removesuffix(".weight").partition(".lora.")
        return f"base_model.model.{published_module(matrix, arch)}.lora_{part.upper()}.weight"
    numbers = iter(re.findall(r"\.(\d+)(?=\.)", name))
    return re.sub("#", lambda _: next(numbers), NAMES[arch][re.sub(r"\.\d+(?=\.)", ".#", name)])


def published_module(name: str, arch: str) -> str:
    """Our name of a module that has a weight to Hugging Face's."""
    return published_name(f"{name}.weight", arch).removesuffix(".weight")


@dataclass(frozen=True)
class Found:
    """The names under which a file holds the parameters, what it lacks, and what it has besides."""

    names: Mapping[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def match(parameters: Iterable[str], held: Iterable[str], arch: str, tied: Iterable[str] = ()) -> Found:
    """Find each of our `parameters` among the names that a file holds, also where a part of the model was saved without the
    prefix of the whole or under words that are no longer used. What is `tied` may be there a second time."""
    held = set(held)
    names = {name: next((other for other in _spellings(name, arch) if other in held), "") for name in parameters}
    copies = {other for name in tied for other in _spellings(name, arch)}
    extra = sorted(name for name in held - set(names.values()) - copies if not BESIDE.match(name))
    missing = (published_name(name, arch) for name, other in names.items() if not other)
    return Found(names, tuple(missing), tuple(extra))


def _spellings(name: str, arch: str) -> Iterator[str]:
    whole = published_name(name, arch)
    for spelled in (whole, whole.split(".", 1)[1]):
        yield spelled
        for new, old in OLD_WORDS:
            if new in spelled:
                yield spelled.replace(new, old)
