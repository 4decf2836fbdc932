"""Prove on this machine that every layout gives what one rank gives.

mpirun -n 4 python -m mpilm.verify
mpirun -n 4 python -m mpilm.verify --model.tie-embeddings false --train.recompute block --train.steps 50
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from mpilm.cli import parse
from mpilm.config import Config, Model, Train, resolve
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.presets import PRESETS
from mpilm.validation import validate

DESCRIPTION = (
    "For each layout of the ranks that mpirun starts (data x pipeline x schedule x ZeRO), train a small model on random tokens "
    "for some steps and compare losses, gradients and final weights with those of one rank by itself. Prints a table; ends "
    "with a code other than 0 when a layout differs."
)


@dataclass(frozen=True)
class VerifyConfig:
    """Settings of the verify command."""

    model: Model = field(
        default_factory=lambda: Model(n_layers=16, n_heads=4, n_kv_heads=2, d_model=32, context_length=16, dropout=0.1)
    )
    train: Train = field(
        default_factory=lambda: Train(steps=3, global_batch=24, micro_batch=1, warmup_steps=1, clip_norm=0.5, device="auto")
    )
    self_test: bool = False
    """Change one bit of one gradient element on one rank: the command must then end with a code other than 0."""


def prepare() -> Body:
    presets = {name: lambda make=make: _of(make()) for name, make in PRESETS.items()}
    asked = parse(sys.argv[1:], VerifyConfig(), "verify", DESCRIPTION, presets)
    config = resolve(Config(model=asked.model, train=asked.train))
    validate(config)
    if not config.train.reproducible:
        raise ConfigError("--train.reproducible false promises no equal bits, so there is nothing to verify")

    def body(comm) -> None:  # type: ignore[no-untyped-def]
        from mpilm.verification.layouts import verify_layouts

        def say(text: str) -> None:
            if comm.rank == 0:
                print(text, flush=True)

        verify_layouts(config, comm, asked.self_test, say)

    return body


def _of(config: Config) -> VerifyConfig:
    return VerifyConfig(config.model, config.train)


if __name__ == "__main__":
    run(prepare)
