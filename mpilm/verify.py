"""Verify that on this machine every layout gives the same bits as one rank.

For each layout of the ranks that mpirun starts (data x pipeline x expert x context x tensor x schedule x ZeRO), train a small
model on random tokens and compare losses, gradients and weights with those of one rank, which has the same tensor and sequence
parts. Of very many layouts, some are drawn. Exits with a code other than 0 if a layout differs.

$ mpirun -n 4 python -m mpilm.verify
$ mpirun -n 4 python -m mpilm.verify --model.tie-embeddings false --train.recompute block --train.steps 50
"""

import sys
from dataclasses import dataclass

from mpilm.checkpoint.pretrained import check_pretrained_shape, with_pretrained_shape
from mpilm.comm.base import Comm
from mpilm.config.check import check_config
from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS
from mpilm.config.schema import Config, ModelConfig, TrainConfig, resolve_config
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run

MODEL = ModelConfig(n_layers=16, n_heads=8, n_kv_heads=4, d_model=64, context_length=16, dropout=0.1)
TRAIN = TrainConfig(steps=3, global_batch=24, micro_batch=1, warmup_steps=1, clip_norm=0.5)


@dataclass(frozen=True)
class VerifyArguments:
    """Settings of the verify command."""

    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    self_test: bool = False  # Flip one bit of one gradient on one rank; the command must then exit with a code other than 0.


def main() -> Body:
    presets = {name: lambda make=make: VerifyArguments(make().model, make().train) for name, make in PRESETS.items()}
    shape_of_folder = with_pretrained_shape, check_pretrained_shape
    arguments = parse(sys.argv[1:], VerifyArguments(), "verify", __doc__ or "", presets, *shape_of_folder)
    config = resolve_config(Config(model=arguments.model, train=arguments.train))
    check_config(config)
    if not config.train.reproducible:
        raise ConfigError("--train.reproducible false does not promise equal bits, so there is nothing to verify")

    def body(comm: Comm) -> None:
        from mpilm.verification.layouts import verify_layouts

        verify_layouts(config, comm, arguments.self_test, lambda text: print(text, flush=True) if comm.rank == 0 else None)

    return body


if __name__ == "__main__":
    run(main)
