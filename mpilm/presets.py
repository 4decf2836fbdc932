"""Named configs: functions that return one. `tiny` is the default of every command; the others have published shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mpilm.config import Checkpoint, Config, Data, Model, Run, Train


def tiny() -> Config:
    """A small model that learns from the embedded corpus in a few minutes on two cores."""
    return Config()


def _published(model: Model, lr: float, global_batch: int, micro_batch: int = 1) -> Config:
    return Config(
        model=model,
        data=Data(eval_fraction=0.005),
        train=Train(
            steps=20000, global_batch=global_batch, micro_batch=micro_batch, lr=lr, min_lr=lr / 10, warmup_steps=1000,
            dtype="bfloat16",
        ),
        checkpoint=Checkpoint(every=1000),
        run=Run(eval_every=500, eval_batches=8),
    )  # fmt: skip


def llama_100m() -> Config:
    """12 blocks of width 768: 110 million parameters with a vocabulary of 32,768."""
    shape = Model(n_layers=12, n_heads=12, d_model=768, d_ff=2048, context_length=1024, tie_embeddings=True)
    return _published(shape, lr=6e-4, global_batch=128)


def llama_1b() -> Config:
    """The shape of TinyLlama: 22 blocks of width 2048, 1.1 billion parameters with a vocabulary of 32,000."""
    shape = Model(n_layers=22, n_heads=32, n_kv_heads=4, d_model=2048, d_ff=5632, context_length=2048, tie_embeddings=False)
    return _published(shape, lr=4e-4, global_batch=512)


def llama_8b() -> Config:
    """The shape of Llama 3 8B: 32 blocks of width 4096, 8.0 billion parameters with a vocabulary of 128,256."""
    shape = Model(
        n_layers=32, n_heads=32, n_kv_heads=8, d_model=4096, d_ff=14336, context_length=8192, tie_embeddings=False,
        rope_theta=500000.0,
    )  # fmt: skip
    return _published(shape, lr=3e-4, global_batch=512)


GPT2 = Model(arch="gpt2", n_layers=12, n_heads=12, d_model=768, context_length=1024)


def gpt2_124m() -> Config:
    """GPT-2: 12 blocks of width 768, 124 million parameters with its vocabulary of 50,257."""
    return _published(GPT2, lr=6e-4, global_batch=480, micro_batch=4)


def gpt2_350m() -> Config:
    """GPT-2 medium: 24 blocks of width 1024, 355 million parameters."""
    return _published(replace(GPT2, n_layers=24, n_heads=16, d_model=1024), lr=3e-4, global_batch=480, micro_batch=2)


def gpt2_1_5b() -> Config:
    """GPT-2 XL: 48 blocks of width 1600, 1.56 billion parameters."""
    return _published(replace(GPT2, n_layers=48, n_heads=25, d_model=1600), lr=2e-4, global_batch=480)


def qwen2_0_5b() -> Config:
    """Qwen2 0.5B: 24 blocks of width 896, 494 million parameters with its vocabulary of 151,936."""
    shape = Model(
        arch="qwen", n_layers=24, n_heads=14, n_kv_heads=2, d_model=896, d_ff=4864, context_length=4096, rope_theta=1e6,
        norm_eps=1e-6,
    )  # fmt: skip
    return _published(shape, lr=4e-4, global_batch=256)


def qwen3_0_6b() -> Config:
    """Qwen3 0.6B: 28 blocks of width 1024, heads of width 128, 596 million parameters with its vocabulary of 151,936."""
    shape = Model(
        arch="qwen", qk_norm=True, n_layers=28, n_heads=16, n_kv_heads=8, head_width=128, d_model=1024, d_ff=3072,
        context_length=4096, rope_theta=1e6, norm_eps=1e-6,
    )  # fmt: skip
    return _published(shape, lr=4e-4, global_batch=256)


def mixtral_8x7b() -> Config:
    """Mixtral 8x7B: 32 blocks of width 4096 with 8 experts, 46.7 billion parameters with its vocabulary of 32,000."""
    shape = Model(
        arch="mixtral", n_layers=32, n_heads=32, n_kv_heads=8, d_model=4096, d_ff=14336, context_length=4096,
        tie_embeddings=False, rope_theta=1e6,
    )  # fmt: skip
    return _published(shape, lr=3e-4, global_batch=512)


BERT = Model(arch="bert", n_layers=12, n_heads=12, d_model=768, context_length=512, norm_eps=1e-12, dropout=0.1)


def bert_base() -> Config:
    """BERT base: 12 blocks of width 768, 110 million parameters with its vocabulary of 30,522."""
    return _published(BERT, lr=1e-4, global_batch=256, micro_batch=4)


def bert_large() -> Config:
    """BERT large: 24 blocks of width 1024, 335 million parameters."""
    return _published(replace(BERT, n_layers=24, n_heads=16, d_model=1024), lr=1e-4, global_batch=256, micro_batch=2)


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "llama-100m": llama_100m,
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "gpt2-1.5b": gpt2_1_5b,
    "qwen2-0.5b": qwen2_0_5b,
    "qwen3-0.6b": qwen3_0_6b,
    "mixtral-8x7b": mixtral_8x7b,
    "bert-base": bert_base,
    "bert-large": bert_large,
}
VOCABULARIES = {
    "llama-100m": 32768, "llama-1b": 32000, "llama-8b": 128256, "gpt2-124m": 50257, "gpt2-350m": 50257, "gpt2-1.5b": 50257,
    "qwen2-0.5b": 151936, "qwen3-0.6b": 151936, "mixtral-8x7b": 32000, "bert-base": 30522, "bert-large": 30522,
}  # fmt: skip
"""The vocabulary that each preset is meant for; a run has that of its tokenizer."""
