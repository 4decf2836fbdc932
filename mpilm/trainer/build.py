"""From a config and a world to everything a run is made of: a straight list of constructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpilm.checkpoint.load import load
from mpilm.checkpoint.pretrained import files_of
from mpilm.checkpoint.save import PARAMETER
from mpilm.comm.activity import Activity
from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError, same_everywhere, together
from mpilm.comm.trace import Traced
from mpilm.config import Config, flatten
from mpilm.data.batch import Batches
from mpilm.data.files import hex_digest
from mpilm.data.gather import digest_files
from mpilm.data.prepare import silent
from mpilm.data.progress import ProgressLine
from mpilm.errors import ConfigError
from mpilm.guard.request import StopRequest
from mpilm.guard.watchdog import PREPARATION
from mpilm.mesh.mesh import Mesh
from mpilm.optim.outer import OUTER
from mpilm.parallel.feasible import mesh_shape
from mpilm.parallel.shard import ALIGNMENT
from mpilm.telemetry.memory import Memory, trim
from mpilm.trainer.balance import choose_cut
from mpilm.trainer.choose import choose_layout
from mpilm.trainer.elastic import Carried
from mpilm.trainer.folder import load_start
from mpilm.trainer.history import History
from mpilm.trainer.machine import Machine, conditions, look, processor, programs
from mpilm.trainer.material import Material, open_material
from mpilm.trainer.run_folder import RunFolder, open_run_folder
from mpilm.trainer.sharded import ShardedModel


@dataclass(frozen=True)
class Training:
    """The parts of a run on one rank. `content`: digests of what was read, by setting; `chosen`: how the layout was."""

    config: Config
    machine: Machine
    mesh: Mesh
    material: Material
    batches: Batches
    folder: RunFolder
    content: Mapping[str, str]
    model: ShardedModel
    request: StopRequest
    history: History
    memory: Memory
    chosen: str = ""


def build(config: Config, world: Comm, carried: Carried | None = None, activity: Activity | None = None) -> Training:
    """Everything `config` asks for, with the state of the checkpoint it goes on from, or the one that ranks have carried over.
    Collective."""
    same_everywhere(world, "settings", flatten(config))
    same_everywhere(world, "programs", programs(world))
    if not config.parallel.auto:
        together(world, lambda: mesh_shape(config, world.size))  # refused before anything is read
    machine = together(world, lambda: look(config.train, world))
    world = world.with_options(config.train.gpu_aware_mpi, machine.crowded)
    activity = activity or Activity()
    waiting = world.with_options(gpu_aware=False, patient=True)  # for rank 0, which may train a tokenizer on all cores
    activity.enter(PREPARATION, 0)
    material = open_material(config, waiting, ProgressLine() if world.rank == 0 else silent)
    activity.enter("start", 0)
    config, chosen = choose_layout(config, config.model.vocab_size or material.tokenizer.vocab_size, machine, world)
    shape = together(world, lambda: mesh_shape(config, world.size))
    mesh = Mesh.build(shape, Traced(world, True, activity), activity)
    batches = Batches(material.stream, config.train.seed, config.train.global_batch, config.train.micro_batch)
    content = _content(config, material, world)
    folder = open_run_folder(config, content, conditions(machine, world, config.parallel), world, carried)
    try:
        return _built(config, machine, mesh, material, batches, content, folder, carried, chosen)
    except BaseException:
        folder.release()
        raise


def _built(
    config: Config, machine: Machine, mesh: Mesh, material: Material, batches: Batches, content: Mapping[str, str],
    folder: RunFolder, carried: Carried | None, chosen: str,
) -> Training:  # fmt: skip
    """The model, and the parts together. Collective."""
    world = mesh.world
    vocab_size = config.model.vocab_size or material.tokenizer.vocab_size
    kinds = world.all_gather_json([machine.threads, processor()])
    if config.parallel.compress and any(kind != kinds[0] for kind in kinds):
        raise AgreedError(ConfigError(
            "--parallel.compress: each rank restores the gradient by itself, and with unequal threads or processors to other "
            "bits; write --train.threads, and use nodes of one kind"
        ))  # fmt: skip
    alignment = ALIGNMENT * max(threads for threads, _ in kinds)
    cut = choose_cut(config, mesh, vocab_size, machine.device)
    memory = Memory(machine.device)  # preparing text may have taken more than training will
    model = ShardedModel(config, mesh, cut, vocab_size, machine.device, alignment)
    _fill(model, folder, world, carried)
    trim()
    request = StopRequest(folder.path / "stop", config.run.time_limit, asks=world.rank == 0)
    return Training(
        config, machine, mesh, material, batches, folder, content, model, request, folder.history, memory, chosen
    )  # fmt: skip


def _content(config: Config, material: Material, world: Comm) -> dict[str, str]:
    """Digests of what the result depends on besides the settings. Collective."""
    content = {**material.content, "model.init_from": ""}
    if config.model.init_from:
        files = files_of(Path(config.model.init_from).expanduser(), config.model.base)
        sizes = together(world, lambda: [path.stat().st_size for path in files])
        content["model.init_from"] = hex_digest(*digest_files(files, sizes, world))
    return content


def _fill(model: ShardedModel, folder: RunFolder, world: Comm, carried: Carried | None) -> None:
    """Give the model the state to go on from, the weights to start with, or random ones. Collective."""
    shape, goes_on = model.config.model, carried is not None or folder.checkpoint is not None
    if shape.init_from and (shape.lora_rank or not goes_on):
        load_start(model, world)
    elif not goes_on:
        model.initialise()
    if carried is not None:
        carried.hand_over({PARAMETER: model.pieces(), **model.optimizer.pieces()})
        model.optimizer.set_step(folder.step - len(folder.history.skipped))
        model.publish()
    elif folder.checkpoint is not None:
        restore(model, folder.checkpoint, folder.step - len(folder.history.skipped), world)


def restore(model: ShardedModel, checkpoint: Path, updates: int, world: Comm) -> None:
    """Give the model the state of a verified checkpoint, after so many updates. Collective."""
    moments = model.optimizer.pieces()
    load(checkpoint, model.pieces(), moments, model.shapes, model.moment_shapes, model.config.model, world, (OUTER,))
    model.optimizer.set_step(updates)
    model.forget()
    model.publish()
