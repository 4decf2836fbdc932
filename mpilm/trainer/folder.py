"""A model that was trained, from its folder, laid out over the ranks to be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpilm.checkpoint.load import load_adapter, load_published
from mpilm.checkpoint.pretrained import base_of, has_adapter, refuse_other_shape, shape_of, tokenizer_folder
from mpilm.comm.base import Comm
from mpilm.comm.together import same_everywhere, together
from mpilm.config import Config, Data, Model, flatten, resolve
from mpilm.data.tokenizer import Tokenizer, named_tokenizer
from mpilm.errors import ConfigError
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.parallel.feasible import cut_by_cost
from mpilm.parallel.shard import ALIGNMENT
from mpilm.trainer.machine import Machine, look
from mpilm.trainer.staged import StagedModel
from mpilm.validation import validate


@dataclass(frozen=True)
class Opened:
    """`config`: with the shape of the folder; `machine`: what this rank computes with."""

    config: Config
    machine: Machine
    model: StagedModel


def configured(config: Config, context_length: int = 0) -> Config:
    """The config with the shape of the folder that model.init-from names, and its tokenizer unless another one is asked for.
    Raises ConfigError, FileError or DataError."""
    folder = config.model.init_from
    if not folder:
        raise ConfigError("--model.init-from is needed: the folder of a checkpoint, RUN/checkpoints/step-NNNNNNNN")
    shape = replace(shape_of(folder, config.model.base), init_from=folder, base=config.model.base)
    shape = replace(shape, context_length=context_length or shape.context_length)
    refuse_other_shape(shape)
    data = (
        config.data if config.data.tokenizer != "auto" else replace(config.data, tokenizer=tokenizer_folder(folder, shape.base))
    )
    config = resolve(replace(config, model=shape, data=data))
    validate(config)
    return config


def open_folder(config: Config, world: Comm) -> Opened:
    """The model of a config made by `configured`, on all ranks: pipelines of parallel.pipeline ranks. Collective."""
    same_everywhere(world, "settings", flatten(config))
    shape = together(world, lambda: _mesh_shape(config, world.size))
    machine = together(world, lambda: look(config.train, world))
    world = world.with_options(config.train.gpu_aware_mpi, machine.crowded)
    vocab_size = config.model.vocab_size
    cut = together(world, lambda: cut_by_cost(config, vocab_size))
    model = StagedModel(config, Mesh.build(shape, world), cut, vocab_size, machine.device, ALIGNMENT)
    load_start(model, world)
    return Opened(config, machine, model)


def load_start(model: StagedModel, world: Comm) -> None:
    """Fill a model with what the folder holds that model.init-from names; an adapter that is not there is drawn. Collective."""
    shape = model.config.model
    folder = Path(shape.init_from).expanduser()
    base = together(world, lambda: base_of(folder, shape.base))
    if not shape.lora_rank:
        load_published(base, model.pieces(), model.shapes, shape, world)
        return model.publish()
    load_published(base, model.frozen_pieces(), model.frozen_shapes, shape, world)
    model.publish_frozen()
    if has_adapter(folder):
        load_adapter(folder, model.pieces(), model.shapes, shape, world)
        return model.publish()
    return model.initialise_trained()


def tokenizer_of(data: Data, model: Model) -> Tokenizer:
    """The tokenizer of a config made by `configured`; raises ConfigError where the model has no rows for all its ids."""
    tokenizer = named_tokenizer(data.tokenizer)
    refuse_more_ids(tokenizer, model)
    return tokenizer


def refuse_more_ids(tokenizer: Tokenizer, model: Model) -> None:
    """Raise ConfigError where the embedding has fewer rows than the tokenizer has ids."""
    rows = model.vocab_size
    if rows and tokenizer.vocab_size > rows:
        whose = f"{model.init_from} has" if model.init_from else f"--model.vocab-size {rows} makes"
        raise ConfigError(
            f"--data.tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, but {whose} {rows} rows for them"
        )


def _mesh_shape(config: Config, ranks: int) -> MeshShape:
    pipeline = config.parallel.pipeline
    if ranks % pipeline:
        raise ConfigError(f"--parallel.pipeline {pipeline} does not divide {ranks} ranks")
    if pipeline > config.model.n_layers:
        raise ConfigError(f"--parallel.pipeline {pipeline}: the model has {config.model.n_layers} layers, at least one a rank")
    return MeshShape(pipeline=pipeline, data=ranks // pipeline)
