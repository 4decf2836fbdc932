"""Named configs and the common settings. `tiny` is the default of every command; the others have published shapes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mpilm.config.schema import Config, ModelConfig, TrainConfig
from mpilm.config.settings import override

COMMON_SETTINGS = (  # the help of train begins with them, and a new config states them
    "data.path", "data.tokenizer", "model.init_from", "model.n_layers", "model.d_model", "model.context_length",
    "train.steps", "train.global_batch", "train.micro_batch", "train.lr", "checkpoint.every", "run.dir",
)  # fmt: skip


def _pretrain(model: ModelConfig, lr: float, global_batch: int, micro_batch: int = 1) -> Config:
    """Return the config for training a published model from scratch on a large corpus."""
    config = Config(model=model, train=TrainConfig(lr=lr, min_lr=lr / 10, global_batch=global_batch, micro_batch=micro_batch))
    steps = {"train.steps": 20000, "train.warmup_steps": 1000, "checkpoint.every": 1000, "run.eval_every": 500}
    return override(config, steps, data__eval_fraction=0.005, train__dtype="bfloat16")


_LLAMA_100M = ModelConfig(n_layers=12, n_heads=12, d_model=768, d_ff=2048, context_length=1024)
_LLAMA = ModelConfig(n_layers=32, n_heads=32, n_kv_heads=8, d_model=4096, d_ff=14336, tie_embeddings=False)
_TINY_LLAMA = replace(_LLAMA, n_layers=22, n_kv_heads=4, d_model=2048, d_ff=5632, context_length=2048)
_LLAMA3_8B = replace(_LLAMA, context_length=8192, rope_theta=500000.0)
_MIXTRAL = replace(_LLAMA, arch="mixtral", context_length=4096, rope_theta=1e6)
_QWEN = ModelConfig(arch="qwen", context_length=4096, rope_theta=1e6, norm_eps=1e-6)
_QWEN2 = replace(_QWEN, n_layers=24, n_heads=14, n_kv_heads=2, d_model=896, d_ff=4864)
_QWEN3 = replace(_QWEN, n_layers=28, n_heads=16, n_kv_heads=8, head_width=128, d_model=1024, d_ff=3072, qk_norm=True)
_GPT2 = ModelConfig(arch="gpt2", n_layers=12, n_heads=12, d_model=768, context_length=1024)
_GPT2_MEDIUM = replace(_GPT2, n_layers=24, n_heads=16, d_model=1024)
_GPT2_XL = replace(_GPT2, n_layers=48, n_heads=25, d_model=1600)
_BERT = ModelConfig(arch="bert", n_layers=12, n_heads=12, d_model=768, context_length=512, norm_eps=1e-12, dropout=0.1)
_BERT_LARGE = replace(_BERT, n_layers=24, n_heads=16, d_model=1024)

PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": Config,  # learns from the embedded corpus in a few minutes on two cores
    "llama-100m": partial(_pretrain, _LLAMA_100M, lr=6e-4, global_batch=128),
    "llama-1b": partial(_pretrain, _TINY_LLAMA, lr=4e-4, global_batch=512),
    "llama-8b": partial(_pretrain, _LLAMA3_8B, lr=3e-4, global_batch=512),
    "gpt2-124m": partial(_pretrain, _GPT2, lr=6e-4, global_batch=480, micro_batch=4),
    "gpt2-350m": partial(_pretrain, _GPT2_MEDIUM, lr=3e-4, global_batch=480, micro_batch=2),
    "gpt2-1.5b": partial(_pretrain, _GPT2_XL, lr=2e-4, global_batch=480),
    "qwen2-0.5b": partial(_pretrain, _QWEN2, lr=4e-4, global_batch=256),
    "qwen3-0.6b": partial(_pretrain, _QWEN3, lr=4e-4, global_batch=256),
    "mixtral-8x7b": partial(_pretrain, _MIXTRAL, lr=3e-4, global_batch=512),
    "bert-base": partial(_pretrain, _BERT, lr=1e-4, global_batch=256, micro_batch=4),
    "bert-large": partial(_pretrain, _BERT_LARGE, lr=1e-4, global_batch=256, micro_batch=2),
}
VOCABULARIES = (  # vocabulary sizes of the published models; a run uses its tokenizer's
    {"llama-100m": 32768, "llama-1b": 32000, "llama-8b": 128256, "mixtral-8x7b": 32000}
    | dict.fromkeys(("gpt2-124m", "gpt2-350m", "gpt2-1.5b"), 50257)
    | dict.fromkeys(("qwen2-0.5b", "qwen3-0.6b"), 151936)
    | dict.fromkeys(("bert-base", "bert-large"), 30522)
)
