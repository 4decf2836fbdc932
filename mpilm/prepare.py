"""Turn text into token files, in parallel over the ranks. The bytes written do not depend on the number of ranks.

$ mpirun -n 8 python -m mpilm.prepare --data.path books/ --data.tokenizer bpe:4096 --output books
$ python -m mpilm.prepare --data.path books/ --stats
"""

import sys
from dataclasses import dataclass, field

from mpilm.config.parse import parse
from mpilm.config.schema import DataConfig
from mpilm.data.prepare import prepare_command
from mpilm.launch.run import Body, run


@dataclass(frozen=True)
class PrepareArguments:
    """Settings of the prepare command."""

    data: DataConfig = field(default_factory=DataConfig)
    output: str = ""  # Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.tokenizer.json.
    stats: bool = False  # Print statistics of the text; without --output write nothing.
    drop_duplicates: bool = False  # Leave out documents that repeat an earlier one exactly.


def main() -> Body:
    return prepare_command(**vars(parse(sys.argv[1:], PrepareArguments(), "prepare", __doc__ or "")))


if __name__ == "__main__":
    run(main)
