"""A model in training: a PipelinedModel with gradient reducers and an optimizer for what this rank owns."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from mpilm.checkpoint.format import PARAMETER
from mpilm.checkpoint.load import load_checkpoint
from mpilm.checkpoint.plan import plan_files
from mpilm.checkpoint.tensor_digests import digest_tensors
from mpilm.comm.base import Comm
from mpilm.config.schema import MIXTURES, Config, microbatch_count
from mpilm.data.batch import Batch
from mpilm.engine.pipelined import PipelinedModel
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import AXES
from mpilm.ops.tree import Interval, TreeNode, even_blocks
from mpilm.optim.norm import compile_row_sum, global_norm
from mpilm.optim.optimizer import Optimizer, moment_shapes
from mpilm.parallel.digests import StateDigests
from mpilm.parallel.expert import ExpertLoad
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import FlatLayout, ParamSlice, intersect_intervals, merge_intervals, shard_owners
from mpilm.parallel.layout import FlatKey, group_by_vector, select_owned, select_parts, select_stage, select_trained
from mpilm.parallel.layout_check import reduces_in_rounds
from mpilm.parallel.offload import Offload
from mpilm.parallel.pipeline.schedules import schedule
from mpilm.parallel.pipeline.stage import StepInputs
from mpilm.parallel.reduce.build import build_reducer
from mpilm.parallel.reduce.diloco import OUTER_MOMENTUM, DiLoCo
from mpilm.parallel.reduce.rounds import MicrobatchRoundReducer
from mpilm.parallel.reduce.step import StepReducer


class TrainModel(PipelinedModel):
    """A PipelinedModel that trains, sharded over the reduce axes as `parallel.zero` says."""

    def __init__(
        self, config: Config, mesh: Mesh, blocks_per_stage: Sequence[int], vocab_size: int, device: torch.device, alignment: int
    ):
        self.reducers: dict[FlatKey, StepReducer | MicrobatchRoundReducer] = {}
        self.reduce_timings: dict[str, float] = {}  # seconds of each method of reduction that was timed
        self.microbatch_count = microbatch_count(config)
        self.loss_scale = 1.0  # a power of two, by which backward multiplies gradients; their sums are divided by it again
        self.blocks = even_blocks(mesh.shape.replicas, self.microbatch_count)  # of each replica, unless they come in rounds
        super().__init__(config, mesh, blocks_per_stage, vocab_size, device, alignment)
        self.is_local_sgd = config.parallel.sync_every > 0  # replicas train independently and synchronize every few steps
        is_compiled = config.train.compile and device.type != "cpu"
        self.row_sum = compile_row_sum() if is_compiled else self.kernels.row_sum()
        self._plan_step()
        self.expert_load = None  # torch.compile leaves no place to count
        if config.model.arch in MIXTURES and not config.train.compile:
            self.expert_load = ExpertLoad(config.model.n_experts, device)
            for model_stage in self.stages.values():
                self.expert_load.observe(model_stage.model)
        diloco = DiLoCo(self.flats, self.reduce_comm, config.parallel.sync_every) if self.is_local_sgd else None
        self.optimizer = Optimizer(self.flats, config.train, self.tensor, diloco)
        self.replicates_moments = self.zero == 0 and not self.is_local_sgd and self.reduce_comm.size > 1
        # Replicas compare the moments that they share; a digest of their own would cost more than that of the weights.
        # Those that are offloaded would have to be read twice more in each step.
        has_digests = not self.replicates_moments and "moments" not in self.offload.parts
        self.digests = StateDigests(self.flat_parameters, self.optimizer.state_slices() if has_digests else {})
        owned = select_owned(select_trained(self.layouts))
        # Global shapes of all tensors of the state, by kind and parameter.
        self.state_shapes = {PARAMETER: self.shapes, **moment_shapes(config.train.optimizer, owned, self.is_local_sgd)}

    def make_reducer(self, key: FlatKey, flat: FlatParameters, model: nn.Module) -> StepReducer | MicrobatchRoundReducer:
        self.reducers[key] = build_reducer(
            flat, model, self.config, self.reduce_timings, self.sequence, self.blocks, self.kernels
        )
        return self.reducers[key]

    def microbatches_of(self, replica: int) -> range:
        """Return the microbatches of a replica, in the order in which it computes them."""
        if reduces_in_rounds(self.config):  # one in each round, so that the round can be reduced at once
            return range(replica, self.microbatch_count, self.replicas.size)
        return range(*self.blocks[replica])

    @property
    def leaf_count(self) -> int:
        """The number of leaves of the tree in which gradients are added."""
        return self.microbatch_count * (self.sequence.gradient_nodes()[1] if reduces_in_rounds(self.config) else 1)

    @property
    def longest_block(self) -> int:
        """The most microbatches that a replica has."""
        return max(len(self.microbatches_of(replica)) for replica in range(self.replicas.size))

    def assign_microbatches(self, blocks: Sequence[TreeNode]) -> None:
        """Give each replica another contiguous block of the microbatches of the following steps. Sums keep their order, and so
        their bits. Only where gradients are not reduced in rounds; collective over the mesh."""
        self.blocks = list(blocks)
        for reducer in self.reducers.values():
            assert isinstance(reducer, StepReducer)
            reducer.close()
        for number, stage in self.stages.items():
            flats = [(key, flat) for key, flat in self.flats.items() if key[0] == number]
            stage.reducers = [self.make_reducer(key, flat, stage.model) for key, flat in flats]
        self._plan_step()

    @property
    def can_overlap(self) -> bool:
        """True if all gradients are summed once a step, and their sums may start during backward."""
        return all(isinstance(each, StepReducer) and each.across_ranks.can_overlap for each in self.reducers.values())

    def overlap_sums(self, overlap: bool) -> None:
        """Start the sums of gradients during the last backward of a step, or after it: alike on all ranks, if `can_overlap`."""
        for reducer in self.reducers.values():
            assert isinstance(reducer, StepReducer)
            reducer.overlap = overlap

    def _plan_step(self) -> None:
        """Derive what a step needs from the reducers and the microbatches of this replica."""
        self.sums = {key: reducer.sums for key, reducer in self.reducers.items()}  # the summed gradients
        self.norm_shards = [  # the part of the gradient that this rank contributes to the norm
            self.sums[key].view(*interval) for key, flat in self.flats.items() for interval in self._unique_intervals(flat)
        ]
        self.microbatch_ids, parallel, count = (
            self.microbatches_of(self.replicas.rank),
            self.config.parallel,
            self.longest_block,
        )
        actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, count)[self.pipeline.rank]
        self.program = self.lower(actions, count, len(self.microbatch_ids))

    def are_replicas_in_sync(self, done: int) -> bool:
        """Return whether all replicas have the same weights after `done` steps."""
        diloco = self.optimizer.diloco
        return diloco is None or diloco.is_due(done, self.config.train.steps)

    def all_gather_parameters(self) -> None:
        with self.digests.recording():
            super().all_gather_parameters()

    def sync_replicas(self) -> None:
        """Synchronize replicas that train independently. Collective over the mesh."""
        if self.optimizer.diloco is not None:
            self.optimizer.diloco.sync()
            self.all_gather_parameters()

    def reset_residuals(self) -> None:
        """Discard error-feedback residuals and DiLoCo anchors, which belong to the state before another one was loaded."""
        if self.optimizer.diloco is not None:
            self.optimizer.diloco.anchors.clear()
        for reducer in self.reducers.values():
            reducer.reset_residuals()

    @property
    def saved_bytes(self) -> int:
        """Bytes of all tensors of a checkpoint."""
        return 4 * sum(prod(shape) for shapes in self.state_shapes.values() for shape in shapes.values())

    def part_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of all tensors of the state by kind and, if a tensor is divided as its parameter is, by part."""
        layouts = select_owned(select_trained(self.layouts))
        return {
            kind: dict(layout.piece_of(shapes[layout.source]) for layout in layouts if layout.source in shapes)
            for kind, shapes in self.state_shapes.items()
        }

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        """Return the slices of parameters and moments that this rank updates, by kind; all kinds on every rank."""
        return {PARAMETER: self.owned_slices(), **self.optimizer.state_slices()}

    @cached_property
    def shard_owners(self) -> dict[str, list[tuple[int, int, list[int]]]]:
        """For each parameter or part of one, ranges of its elements and the world ranks that update each; of the tensor axis,
        all of whose ranks update what is not cut, the first. The same on all ranks."""
        shape, stages, trained = self.mesh.shape, range(len(self.blocks_per_stage)), select_trained(self.layouts)
        owners: dict[str, list[tuple[int, int, list[int]]]] = {}
        places = product(stages, enumerate(self.tensor.parts_of_ranks), enumerate(self.experts.experts_of_ranks))
        for stage, (tensor, parts), (expert, held) in places:
            place = {"pipeline": stage % self.pipeline.size, "tensor": tensor, "expert": expert}
            for key, layouts in group_by_vector(select_parts(select_stage(trained, stage), parts, held)).items():
                axes = next(iter(layouts.values())).reduce_axes
                others = product(*(range(getattr(shape, axis)) for axis in axes))
                ranks = [shape.rank({**dict.fromkeys(AXES, 0), **place, **dict(zip(axes, other))}) for other in others]
                flat = FlatLayout(layouts.values(), self.alignment, per_module=self.zero >= 2, ranks=len(ranks))
                replicas = 1 if self.is_local_sgd else len(ranks)  # that hold the same values
                for layout in select_owned(layouts):
                    if (layout.part is not None or tensor == 0) and (key[1] or expert == 0):
                        shards = shard_owners(layout.name, flat, self.zero > 0)
                        owners[layout.name] = [(start, stop, [ranks[i] for i in own[:replicas]]) for start, stop, own in shards]
        return owners

    def digest_state(self) -> dict[str, str]:
        """Return the digest of each weight and moment, by its name in checkpoints; the same on all layouts. Collective."""
        files = plan_files(self.config.model, self.state_shapes, self.parts)
        return digest_tensors(files, self.state_slices(), self.shard_owners, self.mesh.world)

    def digest_gradients(self) -> dict[str, str]:
        """Return the same of the summed gradients. Collective."""
        files = plan_files(self.config.model, {PARAMETER: self.shapes}, self.parts)
        return digest_tensors(files, {PARAMETER: self.gradient_slices()}, self.shard_owners, self.mesh.world)

    def memory_bytes(self) -> dict[str, int]:
        """Return this rank's bytes where it computes, by part. "passing": weights and gradients that are full only while
        they are used."""
        return {part: 0 if part in self.offload.parts else nbytes for part, nbytes in self._part_bytes().items()}

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the offloaded parts of the state of this rank."""
        return sum(nbytes for part, nbytes in self._part_bytes().items() if part in self.offload.parts)

    def _part_bytes(self) -> dict[str, int]:
        weights = 4 * sum(flat.values.tensor.numel() for flat in self.flat_parameters)
        held = {"weights": weights, "moments": self.optimizer.memory_bytes, "gradients": 0, "exchange": 0, "passing": 0}
        for (stage, _), reducer in self.reducers.items():
            passing = self.stages[stage].parameters.memory_bytes + reducer.memory_bytes.get("passing", 0)
            held["passing"] = max(held["passing"], passing)
            for part in ("gradients", "exchange"):
                held[part] += reducer.memory_bytes[part]
        return held

    @property
    def offload(self) -> Offload:
        """The parts of the state that lie elsewhere."""
        return self.flat_parameters[0].offload

    @property
    def shared_bytes(self) -> int:
        """Bytes of this rank in memory that other ranks of the node map too."""
        return sum(reducer.shared_bytes for reducer in self.reducers.values()) + self.tensor.shared_bytes

    def gradient_slices(self) -> dict[ParamSlice, Tensor]:
        """Return the summed gradient of the parameter slices that this rank updates."""
        return {item: x for key, flat in self.flats.items() for item, x in flat.owned_slices(self.sums[key]).items()}

    def _unique_intervals(self, flat: FlatParameters) -> list[Interval]:
        """Return the intervals that over all ranks contain every parameter of a stage once. ZeRO's division of the flat vector
        (FlatParameters.unique) covers the reduce axes; of ranks that replicate one along other axes the first has it."""
        later = {axis for axis, index in self.mesh.coordinate.items() if index > 0}
        spans = flat.layout.spans.items()
        counted = [name for name, (_, x) in spans if later.isdisjoint({*x.replica_axes} - {*x.reduce_axes})]
        divided = flat.owned if self.is_local_sgd else flat.unique
        return intersect_intervals(divided, merge_intervals(map(flat.layout.padded_span, counted)))

    def scale_gradients(self, factor: float) -> None:
        for key, flat in self.flats.items():
            for interval in flat.owned:
                self.sums[key].view(*interval).mul_(factor)

    def gradient_norm(self) -> float:
        """Return the norm of the gradient; with DiLoCo the largest over the replicas. Collective over the mesh."""
        if not self.is_local_sgd:
            return global_norm(self.norm_shards, self.mesh.world, self.row_sum)
        norm = global_norm(self.norm_shards, self.mesh.comm("pipeline", "tensor"), self.row_sum)
        largest = torch.tensor([norm], dtype=torch.float64, device="cpu")
        self.replicas.all_reduce(largest, "max")
        return float(largest)

    def forward_backward(self, step: int, fetch: Callable[[int], Batch], target_tokens: int) -> None:
        """Run this replica's microbatches forward and backward and reduce the gradients over all replicas. Collective."""
        divisor = self.loss_divisor(target_tokens)
        self._run(self.program, StepInputs(fetch, self.microbatch_ids, step, divisor, self.token_losses))
        self.tied.add_gradients(self.sums)
        if self.loss_scale != 1.0:
            self.scale_gradients(1 / self.loss_scale)

    def loss_divisor(self, target_tokens: int) -> float:
        """Return what the sum of the losses is divided by before backward: the number of target tokens of the step or, if
        replicas train independently, of this replica, and the factor of float16."""
        if self.is_local_sgd:
            target_tokens = max(1, target_tokens * len(self.microbatch_ids) // self.microbatch_count)
        return target_tokens / self.loss_scale


def load_checkpoint_state(model: TrainModel, checkpoint: Path, updates: int, world: Comm) -> None:
    """Load weights and moments of a verified checkpoint, taken after `updates` updates. Collective."""
    load_checkpoint(
        checkpoint, model.state_slices(), model.state_shapes, model.config.model, world, OUTER_MOMENTUM, model.parts
    )
    model.optimizer.set_step(updates)
    model.reset_residuals()
    model.all_gather_parameters()
