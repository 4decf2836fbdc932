"""Construction of a run from a config and a world: a straight list of steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mpilm.checkpoint.pretrained import list_pretrained_files, locate_model
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, check_same_on_all_ranks, run_on_all_ranks
from mpilm.comm.instrumented import instrument
from mpilm.config.schema import Config
from mpilm.config.settings import flatten, override
from mpilm.data.batch import Batches
from mpilm.data.files import hex_digest
from mpilm.data.gather import digest_files
from mpilm.data.training_data import TrainingData, open_training_data
from mpilm.engine.device_transport import connect_devices
from mpilm.engine.hardware import Hardware, detect_hardware, numerics_environment, processor_name, software_fingerprint
from mpilm.engine.pipelined import load_initial_weights
from mpilm.engine.recheck import Recheck
from mpilm.engine.train_model import TrainModel, load_checkpoint_state
from mpilm.errors import ConfigError
from mpilm.kernels.fused import choose_kernels
from mpilm.launch.stop_request import StopRequest
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.parallel.layout_check import resolve_mesh_shape
from mpilm.parallel.offload import make_offload
from mpilm.telemetry.memory import MemoryMeter, trim_heap
from mpilm.trainer.auto_layout import choose_layout, partition_model
from mpilm.trainer.recovery.memory_checkpoint import RecoveredState
from mpilm.trainer.run import Run
from mpilm.trainer.run_folder import open_run_folder


@dataclass(frozen=True)
class RunInputs:
    """Settings, hardware, ranks and data, from which the model of a run is built."""

    config: Config  # with the layout chosen
    hardware: Hardware
    mesh: Mesh
    data: TrainingData
    content: Mapping[str, str]  # digests of what was read, by setting
    vocab_size: int
    layout_note: str


def open_inputs(config: Config, world: Comm) -> RunInputs:
    """Check the settings on all ranks, open the data and arrange the ranks. Collective."""
    check_same_on_all_ranks(world, "settings", flatten(config))
    check_same_on_all_ranks(world, "programs", software_fingerprint(world))
    if not config.parallel.auto:
        run_on_all_ranks(world, lambda: resolve_mesh_shape(config, world.size))  # refused before anything is read
    hardware = run_on_all_ranks(world, lambda: detect_hardware(config.train, world))
    connected = connect_devices(config.train.device_transport, world, hardware, config.fault.elastic)
    world = instrument(connected, checks_calls=False)
    run_on_all_ranks(world, lambda: make_offload(config.train, hardware.device))  # refused before the run has a folder
    world.recorder.enter("preparation")
    yielding = world.with_options(gpu_aware=False, yield_while_waiting=True)  # rank 0 may train a tokenizer on all cores
    data = open_training_data(config, yielding)
    world.recorder.enter("start")
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    config, layout_note = choose_layout(config, vocab_size, hardware, world)
    shape = run_on_all_ranks(world, lambda: resolve_mesh_shape(config, world.size, vocab_size))
    mesh = Mesh(shape, instrument(world, checks_calls=True), world.recorder)
    return RunInputs(config, hardware, mesh, data, _digest_content(config, data, world), vocab_size, layout_note)


def build_train_model(inputs: RunInputs, config: Config) -> tuple[TrainModel, Batches]:
    """Return the model, whose parameters are zero, and the microbatches. `config`: with the parts stated. Collective."""
    hardware, mesh, train = inputs.hardware, inputs.mesh, config.train
    alignment = _common_alignment(config, mesh.world, hardware)
    blocks_per_stage = partition_model(config, mesh, inputs.vocab_size, hardware.device)
    model = TrainModel(config, mesh, blocks_per_stage, inputs.vocab_size, hardware.device, alignment)
    return model, Batches(inputs.data.examples, train.seed, train.global_batch, train.micro_batch)


def build_run(config: Config, world: Comm, recovered: RecoveredState | None = None) -> Run:
    """Build everything `config` asks for, in the state of a checkpoint or of `recovered` if the run resumes. Collective."""
    inputs = open_inputs(config, world)
    mesh, hardware, content = inputs.mesh, inputs.hardware, inputs.content
    environment = numerics_environment(hardware, mesh.world, inputs.config.parallel)
    folder = open_run_folder(inputs.config, content, environment, mesh.world, recovered)
    config = override(inputs.config, folder.retained)
    hardware = replace(hardware, kernels=choose_kernels(config.train, hardware.device))
    try:
        memory = MemoryMeter(hardware.device, config.train.offload != "none")  # from here on: preparation may have used more
        model, batches = build_train_model(inputs, config)
        resumes_from = recovered if recovered is not None else folder.checkpoint
        load_state(model, resumes_from, folder.step - len(folder.bad_steps.skipped), mesh.world)
        trim_heap()
    except BaseException:
        folder.release()
        raise
    stop = StopRequest(folder.path / "stop", config.run.time_limit, query_scheduler=world.rank == 0)
    recheck = Recheck(model, config.fault.recheck_every, folder.step)
    parts = inputs.data, batches, folder, content, model, stop, folder.bad_steps, memory, recheck, inputs.layout_note
    return Run(config, hardware, mesh, *parts)


def _common_alignment(config: Config, world: Comm, hardware: Hardware) -> int:
    """Return the alignment of flat vectors for the largest thread count of all ranks. Collective."""
    environments = world.all_gather_json([hardware.threads, processor_name()])
    if config.parallel.powersgd_rank and any(other != environments[0] for other in environments):
        problem = "each rank decompresses the gradient itself, and with unequal threads or processors the bits would differ"
        advice = "set --train.threads, and use nodes of one kind"
        raise CollectiveError(ConfigError(f"--parallel.powersgd-rank: {problem}; {advice}"))
    return ALIGNMENT * max(threads for threads, _ in environments)


def _digest_content(config: Config, data: TrainingData, world: Comm) -> Mapping[str, str]:
    """Return digests of what the result depends on beside the settings. Collective."""
    content = {**data.content, "model.init_from": ""}
    if config.model.init_from:
        files = list_pretrained_files(locate_model(config.model.init_from), config.model.base)
        sizes = run_on_all_ranks(world, lambda: [path.stat().st_size for path in files])
        content["model.init_from"] = hex_digest(*digest_files(files, sizes, world))
    return content


def load_state(model: TrainModel, source: RecoveredState | Path | None, updates: int, world: Comm) -> None:
    """Give the model the state of a verified checkpoint or of other ranks, taken after `updates` updates; without a source, the
    weights to start with, or random ones. Collective."""
    shape = model.config.model
    if shape.init_from and (shape.lora_rank or source is None):
        load_initial_weights(model, world)
    elif source is None:
        model.init_parameters()
    if isinstance(source, Path):
        load_checkpoint_state(model, source, updates, world)
    elif source is not None:
        source.restore_into(model)
        model.optimizer.set_step(updates)
        model.all_gather_parameters()
