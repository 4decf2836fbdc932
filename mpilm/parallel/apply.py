"""The one function that turns a plain model into a stage of a parallel one, and the reason for its order."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from mpilm.config.schema import Config
from mpilm.kernels.base import Kernels
from mpilm.kernels.fused import use_kernels
from mpilm.kernels.linear_cross_entropy import defer_logits
from mpilm.mesh.mesh import Mesh
from mpilm.ops.expert_axis import ExpertAxis
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.parallel.activation_checkpoint import checkpoint_activations
from mpilm.parallel.cast import CastParameters
from mpilm.parallel.compile import compile_blocks
from mpilm.parallel.expert import divide_experts
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.fsdp import ShardedParameters
from mpilm.parallel.layout import FlatKey, Layouts, group_by_vector, select_trained
from mpilm.parallel.layout_check import can_defer_logits, find_ulysses_problem
from mpilm.parallel.offload import Offload, make_offload
from mpilm.parallel.pipeline.stage import GradientReducer, ModelStage, StageParameters
from mpilm.parallel.plan import cut_of, stage_of
from mpilm.parallel.split_backward import WeightGradQueue, split_backward
from mpilm.parallel.tensor import divide_model

Flats = dict[FlatKey, FlatParameters]


def parallelize(
    model: nn.Module,
    stage: int,
    blocks_per_stage: Sequence[int],
    layouts: Layouts,
    config: Config,
    mesh: Mesh,
    tensor: TensorAxis,
    experts: ExpertAxis,
    device: torch.device,
    alignment: int,
    kernels: Kernels,
    build_reducer: Callable[[FlatKey, FlatParameters, nn.Module], GradientReducer],
) -> tuple[ModelStage, Flats, Flats]:
    """Turn `model`, a whole model on the meta device, into stage `stage`; return it, its trained and its frozen parameters.

    Collective over the reduce axes. `layouts`: of this stage on this rank. The order, and why:

    1. Prune other stages' modules: absent modules are never sharded, wrapped or compiled.
    2. Divide modules into tensor parts, and let layers compute sequence parts: each part is a plain module, to which the other
       steps apply.
    3. Divide experts: those of each tensor part.
    4. Choose the kernels: of the modules that are there now, parts and experts among them; a large head defers its logits.
    5. Allocate the flat parameters: their sizes follow from the steps before alone.
    6. Compile blocks: the compiled function is what recomputation repeats.
    7. Checkpoint activations: it wraps forwards, compiled or not, inside all module hooks.
    8. Split backward: it replaces the forwards of linear layers within the blocks that steps 6 and 7 have wrapped.
    9. Install the parameters: hooks that gather shards must be outermost, so that recomputation in a block finds them gathered.
    10. Register the reducers: their hooks belong to the parameters that step 9 has installed.
    """
    parallel, is_last = config.parallel, stage == len(blocks_per_stage) - 1
    prune_to_stage(model, stage, blocks_per_stage)
    if tensor.slice_count > 1:
        tensor.keeps_inputs = config.train.recompute == "block" or config.train.compile
        tensor.overlaps = parallel.tensor > 1 and parallel.schedule != "zero-bubble" and not config.train.compile
        can_exchange = parallel.context > 1 and device.type == "cpu" and not find_ulysses_problem(config)
        exchanges_heads = can_exchange and parallel.context_method != "ring"
        divide_model(model, partial(cut_of, family=config.model.arch), tensor, exchanges_heads)
    if experts.comm.size > 1:
        divide_experts(model, experts)
    use_kernels(model, kernels)
    if can_defer_logits(config):
        defer_logits(model, kernels)
    offload = make_offload(config.train, device)
    trained = allocate_parameters(select_trained(layouts), device, parallel.zero, mesh, alignment, offload)
    frozen_layouts = {name: layout for name, layout in layouts.items() if layout.frozen}
    # ZeRO-1 and 2 shard gradients and moments, which these do not have.
    frozen = allocate_parameters(frozen_layouts, device, 3 if parallel.zero == 3 else 0, mesh, alignment, offload)
    flats = [*trained.values(), *frozen.values()]
    if config.train.compile:
        compile_blocks(model)
    checkpoint_activations(model, config.train.recompute, config.train.compile)
    weight_grads = WeightGradQueue(is_used=parallel.schedule == "zero-bubble")
    if weight_grads.is_used:
        split_backward(model, weight_grads)
    parameters = install_parameters(flats, model, config, tensor)
    reducers = [build_reducer(key, flat, model) for key, flat in trained.items()]
    autocast, width, seed = make_autocast(config.train.dtype, device), config.model.d_model, config.train.seed
    facts = parameters, weight_grads, tensor, autocast, width, seed, device, mesh.recorder, experts.comm.size > 1
    return ModelStage(model, stage == 0, is_last, reducers, *facts), trained, frozen


def allocate_parameters(
    layouts: Layouts, device: torch.device, zero: int, mesh: Mesh, alignment: int, offload: Offload
) -> Flats:
    """Return memory for these parameters of a stage, one flat vector for those with the same reduce axes."""
    flats = {}
    for key, group in group_by_vector(layouts).items():
        axes, copies = next(iter(group.values())).reduce_axes, mesh.shape.expert if key[1] else 1
        flats[key] = FlatParameters(group, device, zero, mesh.comm(*axes), alignment, copies, offload)
    return flats


def install_parameters(
    flats: Sequence[FlatParameters], model: nn.Module, config: Config, tensor: TensorAxis
) -> StageParameters:
    """Make the parameters of `model` views of flat vectors, or copies in the type in which layers compute: not if they are
    gathered for each use or in files, nor if they have gradients for each part of the sequence, which are added in float32."""
    if config.parallel.zero == 3:
        return ShardedParameters(flats, model)
    if config.train.dtype != "float32" and tensor.sequence.parts == 1 and config.train.offload != "parameters":
        return CastParameters(flats, model, getattr(torch, config.train.dtype), tensor.parts > 1)
    for each in flats:
        each.install(model)
    return StageParameters()


def prune_to_stage(model: nn.Module, stage: int, blocks_per_stage: Sequence[int]) -> None:
    """Remove the modules of other stages from `model`. Parameter names stay the serial ones."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleDict):
            for key in list(child):
                if stage_of(f"{name}.{key}", blocks_per_stage) != stage:
                    del child[key]
        elif next(child.parameters(), None) is not None and stage_of(name, blocks_per_stage) != stage:
            setattr(model, name, None)


def make_autocast(dtype: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Return the context in which forward computes: torch's autocast, disabled for float32."""
    is_enabled = dtype != "float32"
    return partial(torch.autocast, device.type, getattr(torch, dtype) if is_enabled else torch.bfloat16, is_enabled)
