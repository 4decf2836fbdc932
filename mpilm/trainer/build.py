"""From a config and a world to everything a run is made of: a straight list of constructions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from mpilm.checkpoint.load import load
from mpilm.comm.base import Comm
from mpilm.comm.together import same_everywhere, together
from mpilm.comm.trace import Traced
from mpilm.config import Config, Model, flatten, microbatches, validate_ranks
from mpilm.data.batch import Batches
from mpilm.data.corpus import Corpus, open_corpus
from mpilm.data.prepare import silent
from mpilm.data.progress import ProgressLine
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.model.init import initial_value
from mpilm.model.llama import TIED, Llama, initial_std
from mpilm.optim.adamw import AdamW
from mpilm.optim.reduce import GradientSum
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import resolve
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import one_f_one_b
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.parallel.tree import block
from mpilm.telemetry.memory import forget_peak, proportional_bytes, resident_bytes
from mpilm.trainer.machine import Machine, conditions, look
from mpilm.trainer.run_folder import RunFolder, open_run_folder

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Training:
    """The parts of a run on one rank."""

    config: Config
    machine: Machine
    mesh: Mesh
    corpus: Corpus
    batches: Batches
    folder: RunFolder
    model: nn.Module
    flat: FlatParameters
    gradients: GradientSum
    optimizer: AdamW
    stage: ModelStage
    program: list[Action]
    autocast: Autocast
    baseline_bytes: tuple[int, int]  # resident and proportional, before the model


def build(config: Config, world: Comm) -> Training:
    """Everything `config` asks for, with the state of the checkpoint it goes on from. Collective."""
    same_everywhere(world, "settings", flatten(config))
    together(world, lambda: validate_ranks(config, world.size))
    machine = together(world, lambda: look(config.train, world))
    world = world.with_options(config.train.gpu_aware_mpi, machine.crowded)
    mesh = Mesh.build(MeshShape(data=world.size), Traced(world, check=True))
    waiting = world.with_options(gpu_aware=False, patient=True)  # for rank 0, which may train a tokenizer on all cores
    corpus = open_corpus(config.data, waiting, progress=ProgressLine() if world.rank == 0 else silent)
    train = config.train
    batches = together(world, lambda: Batches(
        corpus, config.model.context_length, config.data.eval_fraction, train.seed, train.global_batch, train.micro_batch
    ))  # fmt: skip
    content = {"data.path": corpus.fingerprint, "data.tokenizer": corpus.tokenizer.digest}
    folder = open_run_folder(config, content, conditions(machine, world), world)
    forget_peak()  # preparing text may have taken more than training will
    baseline = resident_bytes(), proportional_bytes()
    model, flat = build_model(config.model, corpus.tokenizer.vocab_size, machine.device)
    data = mesh.comm("data")
    gradients = GradientSum(flat, model, data, microbatches(config), train.reproducible, overlap=machine.device.type == "cuda")
    optimizer = AdamW(flat, train)
    if folder.checkpoint is None:
        initialise(flat, config)
    else:
        flats = [flat.values, *optimizer.flat_moments.values()]
        load(folder.checkpoint, flat.by_name, optimizer.moments, flats, world)
        optimizer.set_step(folder.step)
    autocast = autocast_of(train.dtype, machine.device)
    first, stop = block(data.rank, data.size, microbatches(config))
    stage = ModelStage(model, gradients, first, train.seed, autocast)
    program = lower(one_f_one_b(1, range(first, stop))[0])
    return Training(
        config, machine, mesh, corpus, batches, folder, model, flat, gradients, optimizer, stage, program, autocast, baseline
    )


def build_model(shape: Model, vocab_size: int, device: torch.device) -> tuple[nn.Module, FlatParameters]:
    """The model on `device`, its parameters views of one flat buffer, their values still zero."""
    with torch.device("meta"):
        model = Llama(shape, vocab_size)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    flat = FlatParameters(resolve(shapes, TIED if shape.tie_embeddings else {}), device)
    flat.install(model)
    return model, flat


def initialise(flat: FlatParameters, config: Config) -> None:
    """Draw every parameter by (seed, name, shape)."""
    for name, values in flat.by_name.items():
        values.copy_(initial_value(config.train.seed, name, tuple(values.shape), initial_std(name, config.model)))


def autocast_of(dtype: str, device: torch.device) -> Autocast:
    """The context in which forward computes: bfloat16 by torch's autocast, or float32 as it is."""
    if dtype == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext
