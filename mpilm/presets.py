"""Named configs: functions that return one. `tiny` is the default of every command."""

from __future__ import annotations

from collections.abc import Callable

from mpilm.config import Checkpoint, Config, Data, Generate, Model, Run, Train


def tiny() -> Config:
    """A small model that learns from the embedded corpus in a few minutes on two cores."""
    return Config()


def _published(model: Model, lr: float, global_batch: int) -> Config:
    return Config(
        model=model,
        data=Data(eval_fraction=0.005),
        train=Train(
            steps=20000, global_batch=global_batch, micro_batch=1, lr=lr, min_lr=lr / 10, warmup_steps=1000, dtype="bfloat16"
        ),
        checkpoint=Checkpoint(every=1000),
        run=Run(eval_every=500, eval_batches=8),
        generate=Generate(),
    )


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


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "llama-100m": llama_100m,
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
}
