"""Train a language model.

python -m mpilm.train                               one rank
mpirun -n 8 python -m mpilm.train                   eight
mpirun -n 8 python -m mpilm.train --data.path my_text/ --model.n-layers 8 --train.steps 2000
"""

from __future__ import annotations

import sys

from mpilm.checkpoint.pretrained import tokenizer_folder
from mpilm.cli import parse
from mpilm.config import Config, Model, replaced, resolve
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.presets import PRESETS
from mpilm.telemetry.trackers import check_trackers_installed

DESCRIPTION = (
    "Train a language model, on as many ranks as mpirun starts. With no settings: a small one, on the embedded corpus."
)


def prepare() -> Body:
    config = resolve(parse(sys.argv[1:], Config(), "train", DESCRIPTION, PRESETS))
    check_trackers_installed(config.run.trackers)
    model = config.model
    if model.lora_rank and not model.init_from:
        raise ConfigError("--model.lora-rank adapts a model that is there: name it with --model.init-from FOLDER")
    if not model.lora_rank and (model.lora_targets or model.lora_alpha != Model.lora_alpha):
        raise ConfigError("--model.lora-targets and --model.lora-alpha are of adapters: say how large with --model.lora-rank")
    if model.init_from and config.data.tokenizer == "auto":
        config = replaced(config, data__tokenizer=tokenizer_folder(model.init_from, model.base))

    def body(comm) -> None:  # type: ignore[no-untyped-def]
        from mpilm.trainer.loop import train
        from mpilm.trainer.recovery.elastic import train_elastic

        (train_elastic if config.fault.elastic else train)(config, comm)

    return body


if __name__ == "__main__":
    run(prepare)
