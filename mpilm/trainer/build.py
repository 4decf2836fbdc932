"""From a config and a world to everything a run is made of: a straight list of constructions."""

from __future__ import annotations

from dataclasses import dataclass

from mpilm.checkpoint.load import load
from mpilm.comm.base import Comm
from mpilm.comm.together import same_everywhere, together
from mpilm.comm.trace import Traced
from mpilm.config import Config, flatten
from mpilm.data.batch import Batches
from mpilm.data.corpus import Corpus, open_corpus
from mpilm.data.prepare import silent
from mpilm.data.progress import ProgressLine
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.feasible import mesh_shape
from mpilm.parallel.shard import ALIGNMENT
from mpilm.telemetry.memory import forget_peak, proportional_bytes, resident_bytes, trim
from mpilm.trainer.balance import choose_cut
from mpilm.trainer.machine import Machine, conditions, look
from mpilm.trainer.run_folder import RunFolder, open_run_folder
from mpilm.trainer.sharded import ShardedModel


@dataclass(frozen=True)
class Training:
    """The parts of a run on one rank."""

    config: Config
    machine: Machine
    mesh: Mesh
    corpus: Corpus
    batches: Batches
    folder: RunFolder
    model: ShardedModel
    baseline_bytes: tuple[int, int]  # resident and proportional, before the model


def build(config: Config, world: Comm) -> Training:
    """Everything `config` asks for, with the state of the checkpoint it goes on from. Collective."""
    same_everywhere(world, "settings", flatten(config))
    shape = together(world, lambda: mesh_shape(config, world.size))
    machine = together(world, lambda: look(config.train, world))
    world = world.with_options(config.train.gpu_aware_mpi, machine.crowded)
    mesh = Mesh.build(shape, Traced(world, check=True))
    waiting = world.with_options(gpu_aware=False, patient=True)  # for rank 0, which may train a tokenizer on all cores
    corpus = open_corpus(config.data, waiting, progress=ProgressLine() if world.rank == 0 else silent)
    train = config.train
    batches = together(world, lambda: Batches(
        corpus, config.model.context_length, config.data.eval_fraction, train.seed, train.global_batch, train.micro_batch
    ))  # fmt: skip
    content = {"data.path": corpus.fingerprint, "data.tokenizer": corpus.tokenizer.digest}
    folder = open_run_folder(config, content, conditions(machine, world), world)
    vocab_size, alignment = corpus.tokenizer.vocab_size, ALIGNMENT * max(world.all_gather_json(machine.threads))
    cut = choose_cut(config, mesh, vocab_size, machine.device)
    trim()
    forget_peak()  # preparing text may have taken more than training will
    baseline = resident_bytes(), proportional_bytes()
    model = ShardedModel(config, mesh, cut, vocab_size, machine.device, alignment)
    if folder.checkpoint is None:
        model.initialise()
    else:
        load(folder.checkpoint, model.pieces(), model.optimizer.pieces(), model.shapes, config.model.arch, world)
        model.optimizer.set_step(folder.step)
        model.publish()
    trim()
    return Training(config, machine, mesh, corpus, batches, folder, model, baseline)
