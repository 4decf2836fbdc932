"""Train a language model on all ranks that mpirun starts. By default: a small model on the embedded corpus.

$ python -m mpilm.train
$ mpirun -n 8 python -m mpilm.train --data.path my_text/ --model.n-layers 8 --train.steps 2000
$ mpirun -n 8 python -m mpilm.train --model.init-from FOLDER --data.path my_text/ --train.lr 1e-5 --train.min-lr 1e-6
"""

import sys

from mpilm.checkpoint.pretrained import check_pretrained_shape, find_tokenizer_folder, with_pretrained_shape
from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.config.presets import COMMON_SETTINGS, PRESETS
from mpilm.config.schema import Config, resolve_config
from mpilm.config.settings import override
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.telemetry.trackers import check_trackers_installed


def main() -> Body:
    shape_of_folder = with_pretrained_shape, check_pretrained_shape
    arguments = "train", __doc__ or "", PRESETS, *shape_of_folder, "", COMMON_SETTINGS
    config = resolve_config(parse(sys.argv[1:], Config(), *arguments))
    if config.model.lora_rank and not config.model.init_from:
        raise ConfigError("--model.lora-rank needs a model to adapt: name it with --model.init-from FOLDER")
    check_trackers_installed(config.run.trackers)
    if config.model.init_from and config.data.tokenizer == "auto":
        config = override(config, data__tokenizer=find_tokenizer_folder(config.model.init_from, config.model.base))

    def body(comm: Comm) -> None:
        from mpilm.trainer.loop import train
        from mpilm.trainer.recovery.elastic import train_elastic

        (train_elastic if config.fault.elastic else train)(config, comm)

    body.step_timeout_s = config.fault.step_timeout  # type: ignore[attr-defined]
    return body


if __name__ == "__main__":
    run(main)
