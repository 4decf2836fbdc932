"""Settings of the commands that use a model: where it lies, how it is laid out, how it is computed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mpilm.config import Config, Model, Parallel, Train


@dataclass(frozen=True)
class Folder:
    """The model to use."""

    init_from: str = ""
    """A checkpoint, or a Hugging Face folder with config.json, *.safetensors and tokenizer.json."""
    base: str = ""
    """The model that the adapter in init-from belongs to, where it does not lie where the adapter says."""


@dataclass(frozen=True)
class Stages:
    """How the model is laid out; the ranks that are left share the texts."""

    pipeline: int = 1
    """Ranks that share the layers of one model, for a model that is too large for one; divides the number of ranks."""


@dataclass(frozen=True)
class Compute:
    """How it is computed."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What forward computes in; weights stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU when torch sees one."""
    gpu_aware_mpi: bool = False
    """Hand GPU memory to MPI as it is: only where the site's MPI was built for it."""
    threads: int = 0
    """CPU threads a rank; 0: the cores the rank really has, shared among the ranks of its node."""


def used(folder: Folder, parallel: Stages, compute: Compute, **more: Any) -> Config:
    """The config of a command that uses a model."""
    train = replace(Train(micro_batch=1), **{item.name: getattr(compute, item.name) for item in fields(compute)})
    train = replace(train, global_batch=train.micro_batch)
    model = Model(init_from=folder.init_from, base=folder.base)
    return Config(model=model, parallel=Parallel(pipeline=parallel.pipeline), train=train, **more)
