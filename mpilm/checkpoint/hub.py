"""Models of the Hugging Face Hub: found in the local cache, or downloaded into it. Both need huggingface_hub."""

import re
from pathlib import Path

from mpilm.errors import FileError, UserError
from mpilm.formatting import command_text

WEIGHTS = "*.safetensors"
FILES = (WEIGHTS, "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")  # no pickles, no other formats
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def find_cached_model(name: str) -> Path | None:
    """Return the folder of a model of the Hub in the local cache (HF_HUB_CACHE, HF_HOME); None if it is not there."""
    if not HUB_NAME.fullmatch(name):
        return None
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):  # the library's errors are OSErrors or, for an impossible name, ValueErrors
        return None


def suggest_fetch(name: str) -> str:
    """Return how to get a model that is no folder here, as the end of a message; empty if no model has such a name."""
    advice = f", nor a model in the Hugging Face cache; where there is a network: {command_text('fetch')} {name}"
    return advice if HUB_NAME.fullmatch(name) else ""


def fetch_model(name: str) -> Path:
    """Download what mpilm reads of a model: safetensors, configs and tokenizer. Return its folder; raises UserError."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("downloads need huggingface_hub; install it with: pip install 'mpilm[hub]'") from None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES], ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        problem = str(error).strip().split("\n")[0].rstrip(".")
        advice = "without a network here, fetch the model where there is one and copy the cache (HF_HUB_CACHE)"
        raise FileError(f"{name} cannot be downloaded: {problem}. A gated model needs HF_TOKEN; {advice}") from None
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise FileError(f"{name} has no config.json or no .safetensors files, so mpilm cannot read it")
    return folder
