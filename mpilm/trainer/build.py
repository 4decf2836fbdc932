"""Construction of a run from a config and a world: a straight list of steps."""

from collections.abc import Mapping
from pathlib import Path

from mpilm.checkpoint.pretrained import list_pretrained_files
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, check_same_on_all_ranks, run_on_all_ranks
from mpilm.comm.instrumented import instrument
from mpilm.config.schema import Config, flatten, override
from mpilm.data.batch import Batches
from mpilm.data.files import hex_digest
from mpilm.data.gather import digest_files
from mpilm.data.training_data import TrainingData, open_training_data
from mpilm.engine.hardware import Hardware, detect_hardware, numerics_environment, processor_name, software_fingerprint
from mpilm.engine.pipelined import load_initial_weights
from mpilm.engine.train_model import TrainModel, load_checkpoint_state
from mpilm.errors import ConfigError
from mpilm.launch.stop_request import StopRequest
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.parallel.layout_check import resolve_mesh_shape
from mpilm.telemetry.memory import MemoryMeter, trim_heap
from mpilm.trainer.auto_layout import choose_layout, partition_model
from mpilm.trainer.recovery.memory_checkpoint import RecoveredState
from mpilm.trainer.run import Run
from mpilm.trainer.run_folder import RunFolder, open_run_folder


def build_run(config: Config, world: Comm, recovered: RecoveredState | None = None) -> Run:
    """Build everything `config` asks for, in the state of a checkpoint or of `recovered` if the run resumes. Collective."""
    check_same_on_all_ranks(world, "settings", flatten(config))
    check_same_on_all_ranks(world, "programs", software_fingerprint(world))
    if not config.parallel.auto:
        run_on_all_ranks(world, lambda: resolve_mesh_shape(config, world.size))  # refused before anything is read
    hardware = run_on_all_ranks(world, lambda: detect_hardware(config.train, world))
    world = instrument(world.with_options(config.train.gpu_aware_mpi, hardware.oversubscribed), checks_calls=False)
    world.recorder.enter("preparation")
    yielding = world.with_options(gpu_aware=False, yield_while_waiting=True)  # rank 0 may train a tokenizer on all cores
    data = open_training_data(config, yielding)
    world.recorder.enter("start")
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    config, layout_note = choose_layout(config, vocab_size, hardware, world)
    shape = run_on_all_ranks(world, lambda: resolve_mesh_shape(config, world.size, vocab_size))
    mesh = Mesh(shape, instrument(world, checks_calls=True), world.recorder)
    content = _digest_content(config, data, world)
    folder = open_run_folder(config, content, numerics_environment(hardware, world, config.parallel), world, recovered)
    config = override(config, folder.parts)
    try:
        alignment = _common_alignment(config, mesh.world, hardware)
        blocks_per_stage = partition_model(config, mesh, vocab_size, hardware.device)
        memory = MemoryMeter(hardware.device)  # from here on: preparation may have used more than training will
        model = TrainModel(config, mesh, blocks_per_stage, vocab_size, hardware.device, alignment)
        _load_or_init(model, folder, mesh.world, recovered)
        trim_heap()
    except BaseException:
        folder.release()
        raise
    batches = Batches(data.examples, config.train.seed, config.train.global_batch, config.train.micro_batch)
    stop = StopRequest(folder.path / "stop", config.run.time_limit, query_slurm=world.rank == 0)
    return Run(config, hardware, mesh, data, batches, folder, content, model, stop, folder.bad_steps, memory, layout_note)


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
        files = list_pretrained_files(Path(config.model.init_from).expanduser(), config.model.base)
        sizes = run_on_all_ranks(world, lambda: [path.stat().st_size for path in files])
        content["model.init_from"] = hex_digest(*digest_files(files, sizes, world))
    return content


def _load_or_init(model: TrainModel, folder: RunFolder, world: Comm, recovered: RecoveredState | None) -> None:
    """Give the model the state to resume from, the weights to start with, or random ones. Collective."""
    shape, resumes = model.config.model, recovered is not None or folder.checkpoint is not None
    updates = folder.step - len(folder.bad_steps.skipped)
    if shape.init_from and (shape.lora_rank or not resumes):
        load_initial_weights(model, world)
    elif not resumes:
        model.init_parameters()
    if recovered is not None:
        recovered.restore_into(model)
        model.optimizer.set_step(updates)
        model.all_gather_parameters()
    elif folder.checkpoint is not None:
        load_checkpoint_state(model, folder.checkpoint, updates, world)
