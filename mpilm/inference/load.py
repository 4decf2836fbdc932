"""A trained model loaded from its folder and distributed over the ranks."""

from dataclasses import replace

from mpilm.checkpoint.pretrained import check_pretrained_shape, find_tokenizer_folder, read_pretrained_config
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import check_same_on_all_ranks, run_on_all_ranks
from mpilm.config.check import check_config
from mpilm.config.schema import Config, replica_size, resolve_config
from mpilm.config.settings import flatten, override
from mpilm.engine.device_transport import connect_devices
from mpilm.engine.hardware import detect_hardware
from mpilm.engine.pipelined import PipelinedModel, load_initial_weights
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.parallel.layout_check import can_divide_parts, partition_by_cost


def config_from_folder(config: Config, context_length: int = 0) -> Config:
    """Return the config with the shape of model.init-from, and its tokenizer unless another is named; raises UserError."""
    folder = config.model.init_from
    if not folder:
        raise ConfigError("--model.init-from is required: the folder of a checkpoint, RUN/checkpoints/step-NNNNNNNN")
    shape = replace(read_pretrained_config(folder, config.model.base), init_from=folder, base=config.model.base)
    shape = replace(shape, context_length=context_length or shape.context_length)
    if shape.tensor_parts % config.parallel.tensor:
        shape = replace(shape, tensor_parts=0)  # one for each rank, with other last bits
    if not can_divide_parts(shape.sequence_parts, config.parallel.context):
        shape = replace(shape, sequence_parts=0)
    check_pretrained_shape(shape)
    if config.data.tokenizer == "auto":
        config = override(config, data__tokenizer=find_tokenizer_folder(folder, shape.base))
    config = resolve_config(replace(config, model=shape))
    check_config(config)
    return config


def load_model(config: Config, world: Comm) -> PipelinedModel:
    """Load the model of a config from `config_from_folder`, on all ranks: pipelines of parallel.pipeline ranks. Collective."""
    check_same_on_all_ranks(world, "settings", flatten(config))
    shape = run_on_all_ranks(world, lambda: _mesh_shape(config, world.size))
    hardware = run_on_all_ranks(world, lambda: detect_hardware(config.train, world))
    world = connect_devices(config.train.device_transport, world, hardware)
    blocks_per_stage = run_on_all_ranks(world, lambda: partition_by_cost(config, config.model.vocab_size))
    model = PipelinedModel(config, Mesh(shape, world), blocks_per_stage, config.model.vocab_size, hardware.device, ALIGNMENT)
    load_initial_weights(model, world)
    return model


def _mesh_shape(config: Config, ranks: int) -> MeshShape:
    pipeline, each = config.parallel.pipeline, replica_size(config.parallel) * config.parallel.expert
    sizes = {axis: getattr(config.parallel, axis) for axis in ("pipeline", "expert", "context", "tensor")}
    if ranks % each:
        product = " times ".join(f"--parallel.{axis} {n}" for axis, n in sizes.items() if n > 1)
        raise ConfigError(f"{product} does not divide {count_noun(ranks, 'rank')}; start {-(-ranks // each) * each} ranks")
    if pipeline > config.model.n_layers:
        raise ConfigError(f"--parallel.pipeline {pipeline}: the model has {config.model.n_layers} layers, at least one a rank")
    return MeshShape(data=ranks // each, **sizes)
