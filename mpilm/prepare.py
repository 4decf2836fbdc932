"""Text to token files, in parallel over the ranks.

mpirun -n 8 python -m mpilm.prepare --data.path books/ --data.tokenizer bpe:4096 --output books
python -m mpilm.prepare --data.path books/ --stats
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.config.schema import DataConfig
from mpilm.data.prepare import Meta, prepare, silent, survey
from mpilm.data.progress import ProgressLine
from mpilm.data.stats import table
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run


@dataclass(frozen=True)
class PrepareConfig:
    """What to read and what to make of it."""

    data: DataConfig = field(default_factory=DataConfig)
    output: str = ""
    """Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.tokenizer.json."""
    stats: bool = False
    """Print what the text is made of; without --output nothing is written."""
    drop_duplicates: bool = False
    """Leave out documents that repeat an earlier one exactly."""


def configure(argv: Sequence[str]) -> PrepareConfig:
    """The config of a command line; raises ConfigError when it asks for nothing."""
    description = "Turn text into token files, in parallel; the bytes written do not depend on how many ranks do it."
    config = parse(argv, PrepareConfig(), "prepare", description)
    if config.output and (not Path(config.output).name or config.output.endswith("/") or Path(config.output).is_dir()):
        raise ConfigError(f"--output {config.output} is a folder; write a prefix such as {config.output.rstrip('/')}/tokens")
    if not config.output and not config.stats:
        raise ConfigError("say where to write the tokens with --output PREFIX, or ask for --stats")
    return config


def command(config: PrepareConfig, comm: Comm) -> None:
    """Do what the config asks for; rank 0 prints. Collective."""
    comm = comm.with_options(gpu_aware=False, yield_while_waiting=True)  # ranks wait for one that trains the tokenizer
    progress = ProgressLine() if comm.rank == 0 else silent
    if config.stats:
        statistics = survey(config.data, comm, progress)
        if comm.rank == 0:
            print(table(statistics), flush=True)
    if config.output:
        meta = prepare(config.data, config.output, comm, config.drop_duplicates, progress=progress)
        if comm.rank == 0:
            print(_summary(config.output, meta), flush=True)


def _summary(output: str, meta: Meta) -> str:
    dropped = f", {meta.dropped_duplicates:,} duplicates dropped" if meta.dropped_duplicates else ""
    return (
        f"{output}.bin: {meta.tokens:,} tokens of {meta.dtype} in {meta.documents:,} documents{dropped}; "
        f"{meta.source_bytes / meta.tokens:.2f} bytes a token with {meta.tokenizer}"
    )


def plan() -> Body:
    config = configure(sys.argv[1:])
    return lambda comm: command(config, comm)


if __name__ == "__main__":
    run(plan)
