"""Fold a LoRA adapter into its base model, and write the result as a Hugging Face folder.

The adapter is a checkpoint of a run with --model.lora-rank, or a folder that PEFT wrote. Each merged matrix is computed in
float64 and rounded once to the dtype of the base; all other tensors keep their bytes.

$ python -m mpilm.merge runs/NAME/checkpoints/step-00000360 merged
$ python -m mpilm.merge ADAPTER merged --base FOLDER
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.formatting import command_text
from mpilm.launch.local import run_local


@dataclass(frozen=True)
class MergeArguments:
    """The adapter, and the folder to write."""

    folders: Annotated[tuple[str, ...], Positional, arg(metavar="ADAPTER OUT")] = ()  # Folder of the adapter; folder to write.
    base: str = ""  # Folder or name of the base model; empty: the one that the adapter names.


def main() -> Callable[[], None]:
    arguments = parse(sys.argv[1:], MergeArguments(), "merge", __doc__ or "", positional="folders")
    if len(arguments.folders) != 2:
        raise ConfigError(f"name the folder of an adapter and a folder to write: {command_text('merge')} ADAPTER OUT")

    def merge() -> None:
        from mpilm.checkpoint.merge import merge_adapter

        adapter, out = arguments.folders
        base = merge_adapter(adapter, Path(out).expanduser(), arguments.base)
        print(f"{out}: {base} with the adapter {adapter}, a Hugging Face folder")

    return merge


if __name__ == "__main__":
    run_local(main)
