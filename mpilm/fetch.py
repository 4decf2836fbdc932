"""Download a model from the Hugging Face Hub into the local cache: its safetensors files, configs and tokenizer, no code.

Other commands then take its name: --model.init-from OWNER/NAME. Where nodes have no network, fetch the model on a login node.
HF_HOME or HF_HUB_CACHE moves the cache, HF_TOKEN opens gated models.

$ python -m mpilm.fetch Qwen/Qwen3-0.6B
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.checkpoint.hub import fetch_model
from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.formatting import command_text
from mpilm.launch.local import run_local


@dataclass(frozen=True)
class FetchArguments:
    """The model to download."""

    name: Annotated[str, Positional, arg(metavar="NAME")] = ""  # Name of the model on the Hub: OWNER/NAME.


def main() -> Callable[[], None]:
    name = parse(sys.argv[1:], FetchArguments(), "fetch", __doc__ or "", positional="name").name
    if not name:
        raise ConfigError(f"name a model of the Hugging Face Hub: {command_text('fetch')} Qwen/Qwen3-0.6B")
    return lambda: print(f"{name} is in {fetch_model(name)}; write --model.init-from {name}")


if __name__ == "__main__":
    run_local(main)
