"""A model whose stages are distributed over the pipeline axis. All that depends on the layout is here and in train_model.py."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.checkpoint.load import load_hf_weights
from mpilm.checkpoint.pretrained import find_base_model, has_adapter, locate_model
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config.schema import Config, ModelConfig, TrainConfig, sequence_part_count, tensor_part_count
from mpilm.data.batch import Batch
from mpilm.kernels.fused import make_kernels
from mpilm.mesh.mesh import Mesh
from mpilm.model.families import build_model, initial_std, initial_value, tied_parameters
from mpilm.model.lora import is_frozen
from mpilm.model.sequence_info import KVCache
from mpilm.ops.expert_axis import ExpertAxis
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.ops.tree import block_of_rank
from mpilm.optim.optimizer import needs_full_parameter
from mpilm.parallel.apply import Flats, parallelize
from mpilm.parallel.compile import compiled_loss_sum
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.fsdp import all_gather_shards
from mpilm.parallel.layout import (
    REDUCE_AXES,
    FlatKey,
    ParamLayout,
    global_shapes,
    resolve_layouts,
    select_parts,
    select_stage,
    select_trained,
)
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.execute import StageMessenger, execute
from mpilm.parallel.pipeline.schedules import forward_only, gpipe, lower, zero_bubble
from mpilm.parallel.pipeline.stage import GradientReducer, ModelStage, StepInputs, last_logits, token_losses
from mpilm.parallel.plan import cut_of, expert_of, stage_of
from mpilm.parallel.tensor import slice_part
from mpilm.parallel.tied import TiedParameters


class PipelinedModel:
    """The stages of a model on this rank; parameters are zero until they are initialised or loaded. `blocks_per_stage`: the cut
    into stages. `alignment`: of flat vectors, in elements, equal on all ranks. The constructor is collective over the mesh."""

    def __init__(
        self, config: Config, mesh: Mesh, blocks_per_stage: Sequence[int], vocab_size: int, device: torch.device, alignment: int
    ):
        self.config, self.mesh, self.blocks_per_stage, self.device = config, mesh, tuple(blocks_per_stage), device
        self.vocab_size, self.alignment = vocab_size, alignment
        self.pipeline, self.replicas, self.reduce_comm = (
            mesh.comm(*axes) for axes in (("pipeline",), ("data", "expert"), REDUCE_AXES)
        )
        self.zero = config.parallel.zero
        self.sequence = SequenceAxis(mesh.comm("context"), sequence_part_count(config))
        self.tensor = TensorAxis(mesh.comm("tensor"), tensor_part_count(config), self.sequence)
        self.experts = ExpertAxis(mesh.comm("expert"), config.model.n_experts)
        # All parameters of the model, and those that ranks with this rank's tensor parts and experts have.
        self.layouts = resolve_model_layouts(
            config.model, vocab_size, blocks_per_stage, config.train.optimizer, self.tensor.parts, mesh.shape.expert > 1
        )
        self.parts = {name: layout.part for name, layout in self.layouts.items() if layout.part is not None}
        local = select_parts(self.layouts, self.tensor.local_parts, self.experts.local_experts)
        self.shapes = global_shapes(select_trained(self.layouts))
        self.frozen_shapes = global_shapes({name: layout for name, layout in self.layouts.items() if layout.frozen})
        self.kernels = make_kernels(config.train, device)
        self.flats, self.frozen = Flats(), Flats()  # trained parameters of this rank's stages, and frozen ones
        self.stages: dict[int, ModelStage] = {}
        for stage in range(self.pipeline.rank, len(blocks_per_stage), self.pipeline.size):
            model, layouts = meta_model(config.model, vocab_size), select_stage(local, stage)
            axes = mesh, self.tensor, self.experts
            self.stages[stage], trained, frozen = parallelize(
                model, stage, blocks_per_stage, layouts, config, *axes, device, alignment, self.kernels, self.make_reducer
            )
            self.flats |= trained
            self.frozen |= frozen
        self.flat_parameters = [*self.flats.values(), *self.frozen.values()]
        self.tied = TiedParameters(select_trained(local), self.flats, self.pipeline)
        frozen_layouts = {name: layout for name, layout in local.items() if layout.frozen}
        self.tied_frozen = TiedParameters(frozen_layouts, self.frozen, self.pipeline)
        self.messenger = StageMessenger(self.pipeline)
        self.token_losses = partial(token_losses, sum_losses=self.kernels.loss_sum)
        if config.train.compile and self.tensor.parts == 1:
            self.token_losses = partial(token_losses, sum_losses=compiled_loss_sum())

    def make_reducer(self, key: FlatKey, flat: FlatParameters, model: nn.Module) -> GradientReducer:
        """Return the gradient reducer of some parameters: none here, where the model only runs forward."""
        return GradientReducer()

    @property
    def local_numel(self) -> int:
        """Parameters that this rank holds permanently: those of its stages, or with ZeRO-3 its shard of them."""
        slices = (item for flat in self.flat_parameters for item in flat.layout.param_slices(flat.values.intervals))
        return sum(item.numel for item in slices)

    def init_parameters(self, frozen: bool = True) -> None:
        """Draw the trained parameters, and the `frozen` ones, from (seed, name, shape). Collective."""
        for flat in self.flat_parameters if frozen else self.flats.values():
            draw_values(flat, self.config.model, self.config.train.seed)
        self.tied_frozen.copy_values()
        self.all_gather_parameters()

    def all_gather_parameters(self) -> None:
        """Bring what each rank has updated to all ranks that use it. Collective."""
        self.tied.copy_values()
        if self.zero in (1, 2):
            for flat in self.flats.values():
                all_gather_shards(flat, flat.values)
        self.refresh_parameters()

    def refresh_parameters(self) -> None:
        """Let the layers of this rank compute with the values that its flat vectors hold now."""
        for stage in self.stages.values():
            stage.parameters.refresh()

    def owned_slices(self) -> dict[ParamSlice, Tensor]:
        """Return the slices of trained parameters that this rank updates."""
        return _owned_slices(self.flats.values())

    def forward(
        self, total: int, fetch: Callable[[int], Batch], output_fn: Callable[[Tensor, Batch], Tensor] | None = None
    ) -> Mapping[int, Tensor]:
        """Run `total` microbatches forward, divided over the replicas, without dropout; return `results()`: `output_fn` of the
        logits of each, or its loss. Collective."""
        ids = range(*block_of_rank(self.replicas.rank, self.replicas.size, total))
        return self._run_forward(
            -(-total // self.replicas.size), StepInputs(fetch, ids, output_fn=output_fn or self.token_losses)
        )

    def results(self) -> Mapping[int, Tensor]:
        """Return the outputs of this rank's microbatches, by number, on the first rank of the tensor axis with the last stage;
        empty on others."""
        return {} if self.tensor.comm.rank else self._outputs()

    def _outputs(self) -> Mapping[int, Tensor]:
        return {m: x for stage in self.stages.values() for m, x in stage.results.items()}

    def next_logits(self, batches: Mapping[int, Batch], kv_caches: Mapping[int, KVCache]) -> Mapping[int, Tensor]:
        """Return the logits (V,) of the token after each of this replica's sequences, by number, on ranks with the last stage.
        `kv_caches`: of each sequence, on this rank. Collective over the pipeline axis."""
        ids = list(batches)
        inputs = StepInputs(batches.__getitem__, ids, output_fn=last_logits, kv_caches=kv_caches)
        self._run_forward(len(ids), inputs)
        return self._outputs()

    def _run_forward(self, count: int, inputs: StepInputs) -> Mapping[int, Tensor]:
        """Run `count` microbatches forward, of which this replica has those in `inputs`; return `results()`."""
        actions = forward_only(self.config.parallel.pipeline, self.config.parallel.chunks, count)[self.pipeline.rank]
        self._run(self.lower(actions, count, len(inputs.microbatch_ids)), inputs)
        return self.results()

    @contextlib.contextmanager
    def observing(self, observe: Callable[[int, int, str, Tensor], None]) -> Iterator[None]:
        """Call observe(stage, microbatch, label, x) for each message, loss and gradient of this rank (see ModelStage)."""
        with contextlib.ExitStack() as stack:
            for number, stage in self.stages.items():
                stack.enter_context(stage.observing(partial(observe, number)))
            yield

    def recompute(self, step: int, fetch: Callable[[int], Batch], microbatch_ids: Sequence[int], divisor: float) -> None:
        """Run forward and backward of one microbatch, or none on this replica, and discard its gradients. Collective."""
        parallel, make = self.config.parallel, zero_bubble if self.config.parallel.schedule == "zero-bubble" else gpipe
        actions = make(parallel.pipeline, parallel.chunks, 1)[self.pipeline.rank]
        program = [action for action in self.lower(actions, 1, len(microbatch_ids)) if action.kind != "REDUCE"]
        with contextlib.ExitStack() as stack:
            for stage in self.stages.values():
                stack.enter_context(stage.discarding_gradients())
            self._run(program, StepInputs(fetch, microbatch_ids, step, divisor, self.token_losses))

    def lower(self, actions: Sequence[Action], count: int, own: int) -> Sequence[Action]:
        """Return the program of a schedule of `count` microbatches, of which this replica has `own`. If ranks of other replicas
        need its experts, it runs those that it lacks as well, without sequences."""
        return lower(actions, len(self.blocks_per_stage), count if self.experts.comm.size > 1 else own)

    def _run(self, program: Sequence[Action], inputs: StepInputs) -> None:
        for stage in self.stages.values():
            stage.start(inputs)
        execute(program, self.stages, self.messenger, self.mesh.recorder)


def _owned_slices(flats: Iterable[FlatParameters]) -> dict[ParamSlice, Tensor]:
    return {item: x for flat in flats for item, x in flat.owned_slices(flat.values).items()}


def meta_model(shape: ModelConfig, vocab_size: int) -> nn.Module:
    """Return the whole model without memory."""
    with torch.device("meta"):
        return build_model(shape, vocab_size)


def draw_values(flat: FlatParameters, shape: ModelConfig, seed: int) -> None:
    """Draw the initial values, from (seed, name, shape), of what this rank owns of a stage."""
    name, values = "", torch.empty(0)
    for item, out in flat.owned_slices(flat.values).items():
        if name != item.name:
            name, layout = item.name, flat.layout.spans[item.name][1]
            values = initial_value(seed, layout.source, layout.global_shape, initial_std(layout.source, shape))
            values = slice_part(values, layout.part).flatten()
        out.copy_(values[item.start : item.stop])


def load_initial_weights(model: PipelinedModel, world: Comm) -> None:
    """Load the weights in the folder that model.init-from names; draw an adapter that it does not hold. Collective."""
    shape = model.config.model
    folder = locate_model(shape.init_from)
    base = run_on_all_ranks(world, lambda: find_base_model(folder, shape.base))
    if not shape.lora_rank:
        load_hf_weights(base, model.owned_slices(), model.shapes, shape, world, parts=model.parts)
        return model.all_gather_parameters()
    load_hf_weights(base, _owned_slices(model.frozen.values()), model.frozen_shapes, shape, world, parts=model.parts)
    if not has_adapter(folder):
        return model.init_parameters(frozen=False)
    load_hf_weights(folder, model.owned_slices(), model.shapes, shape, world, True, model.parts)
    model.tied_frozen.copy_values()
    return model.all_gather_parameters()


def resolve_model_layouts(
    shape: ModelConfig,
    vocab_size: int,
    blocks_per_stage: Sequence[int],
    optimizer: str = TrainConfig.optimizer,
    parts: int = 1,
    divides_experts: bool = False,
) -> dict[str, ParamLayout]:
    """Return the layout of every parameter of the model divided into these stages and tensor parts, and by experts."""
    return resolve_layouts(
        {name: tuple(p.shape) for name, p in meta_model(shape, vocab_size).named_parameters()},
        tied_parameters(shape),
        partial(stage_of, blocks_per_stage=blocks_per_stage),
        partial(cut_of, family=shape.arch),
        parts,
        needs_full_parameter(optimizer),
        partial(is_frozen, model=shape),
        expert_of if divides_experts else lambda name: None,
    )
