"""A model shared out over the mesh: its stages on this rank, their parameters and gradients, the optimizer of what it updates.

Everything that depends on the layout is here; what is trained, on which data and for how long, is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.config import Config, Model, microbatches
from mpilm.data.batch import Batch
from mpilm.mesh.mesh import Mesh
from mpilm.model.families import build, initial_std, tied
from mpilm.model.init import initial_value
from mpilm.optim.adamw import AdamW
from mpilm.optim.dealt import DealtSum
from mpilm.optim.reduce import BlockSum
from mpilm.parallel.cut import keep_stage
from mpilm.parallel.deferred import Store, defer
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.gathered import GatheredParameters, ResidentParameters, gather_shards
from mpilm.parallel.layout import Layout, of_stage, owned, resolve
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.execute import Timed, Wire, execute
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import forward_only, schedule
from mpilm.parallel.pipeline.stage import Feed, ModelStage
from mpilm.parallel.plan import stage_of
from mpilm.parallel.recompute import recompute
from mpilm.parallel.shard import FlatLayout, Piece, holders
from mpilm.parallel.tied import Ties
from mpilm.parallel.tree import block, dealt

Autocast = Callable[[], AbstractContextManager[object]]


class ShardedModel:
    """`cut`: blocks of each stage. `alignment`: of the flat vectors, in elements, the same on all ranks.

    Collective over the mesh, as are the methods that say so. Parameters are zero until they are initialised or loaded.
    """

    def __init__(self, config: Config, mesh: Mesh, cut: Sequence[int], vocab_size: int, device: torch.device, alignment: int):
        self.config, self.mesh, self.cut, self.device = config, mesh, tuple(cut), device
        self.vocab_size, self.alignment = vocab_size, alignment
        self.pipeline, self.data = mesh.comm("pipeline"), mesh.comm("data")
        self.zero, total = config.parallel.zero, microbatches(config)
        self.layouts = resolve_layouts(config.model, vocab_size, cut)
        self.numbers = dealt(self.data.rank, self.data.size, total) if self.zero >= 2 else range(*self._block(total))
        """The microbatches of this replica, in the order in which it computes them."""
        self._elsewhere: dict[int, FlatLayout] = {}
        self.flats: dict[int, FlatParameters] = {}
        self.gradients: dict[int, BlockSum | DealtSum] = {}
        self.stages = {stage: self._stage(stage) for stage in range(self.pipeline.rank, len(cut), self.pipeline.size)}
        self.optimizer = AdamW(self.flats, config.train)
        self.ties = Ties(self.layouts, self.flats, self.pipeline)
        self.wire = Wire(self.pipeline)
        parallel = config.parallel
        actions = schedule(
            parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatches(config, mesh.shape)
        )[self.pipeline.rank]  # fmt: skip
        self.program = lower(actions, len(cut), len(self.numbers))

    def _block(self, total: int) -> tuple[int, int]:
        return block(self.data.rank, self.data.size, total)

    def _stage(self, stage: int) -> ModelStage:
        config, last = self.config, len(self.cut) - 1
        model = meta_model(config.model, self.vocab_size)
        keep_stage(model, stage, self.cut)
        flat = FlatParameters(
            of_stage(self.layouts, stage), self.device, self.zero, self.data.rank, self.data.size, self.alignment
        )
        store, presence = Store(), ResidentParameters()
        recompute(model, config.train.recompute)
        if config.parallel.schedule == "zero-bubble":
            defer(model, store)
        if self.zero == 3:
            presence = GatheredParameters(flat, model, self.data)
        else:
            flat.install(model)
        self.flats[stage], self.gradients[stage] = flat, self._gradient_sum(flat, model)
        return ModelStage(
            model, (stage == 0, stage == last), self.gradients[stage], presence, store,
            config.model.d_model, config.train.seed, autocast_of(config.train.dtype, self.device), self.device,
        )  # fmt: skip

    def _gradient_sum(self, flat: FlatParameters, model: nn.Module) -> BlockSum | DealtSum:
        total, train = microbatches(self.config), self.config.train
        if self.zero >= 2:
            return DealtSum(flat, model, self.data, total)
        return BlockSum(flat, model, self.data, total, train.reproducible, overlap=self.device.type == "cuda")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that are optimized and saved, in the order of the model."""
        return {layout.name: layout.shape for layout in owned(self.layouts)}

    @property
    def held_numel(self) -> int:
        """Parameters whose values this rank holds for good: its stages, or with ZeRO-3 its shard of them."""
        return sum(piece.numel for flat in self.flats.values() for piece in flat.layout.pieces(flat.values.intervals))

    # Values.

    def initialise(self) -> None:
        """Draw every parameter by (seed, name, shape). Collective."""
        for flat in self.flats.values():
            draw(flat, self.config.model, self.config.train.seed)
        self.publish()

    def publish(self) -> None:
        """Bring what each rank has updated to all ranks that use it. Collective."""
        self.ties.copy_values()
        if self.zero in (1, 2):
            for flat in self.flats.values():
                gather_shards(flat, self.data)

    def pieces(self) -> dict[Piece, Tensor]:
        """What this rank updates, as parts of parameters."""
        return {piece: x for flat in self.flats.values() for piece, x in flat.pieces(flat.values).items()}

    def holders(self, name: str) -> list[tuple[int, int, list[int]]]:
        """Ranges of a parameter's elements, and the ranks of the world that update each. Pure, the same on all ranks."""
        stage, shape = self.layouts[name].stage, self.mesh.shape
        if stage not in self._elsewhere:
            layouts = of_stage(self.layouts, stage).values()
            self._elsewhere[stage] = FlatLayout(layouts, self.alignment, apart=self.zero >= 2)
        flat = self._elsewhere[stage]
        place = {**dict.fromkeys(self.mesh.coordinate, 0), "pipeline": stage % self.pipeline.size}
        return [
            (start, stop, [shape.rank({**place, "data": data}) for data in ranks])
            for start, stop, ranks in holders(name, flat, self.data.size, self.zero > 0)
        ]

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights, moments, partial sums of gradients and what their exchange needs, on this rank; passing: of weights
        and gradients that are whole only while they are used."""
        weights = 4 * sum(flat.values.tensor.numel() for flat in self.flats.values())
        moments = 4 * sum(vector.tensor.numel() for of in self.optimizer.moments.values() for vector in of.values())
        found = {"weights": weights, "moments": moments, "gradients": 0, "exchange": 0, "passing": 0}
        for stage, gradients in self.gradients.items():
            found["passing"] = max(found["passing"], self.stages[stage].presence.held_bytes)
            for part, count in gradients.held_bytes.items():
                found[part] += count
        return found

    # Gradients.

    @property
    def sums(self) -> dict[int, FlatVector]:
        """The summed gradients, by stage."""
        return {stage: gradients.sums for stage, gradients in self.gradients.items()}

    def gradient_pieces(self) -> dict[Piece, Tensor]:
        """The summed gradient of what this rank updates, as parts of parameters."""
        return {piece: x for stage, flat in self.flats.items() for piece, x in flat.pieces(self.sums[stage]).items()}

    def counted(self) -> list[Tensor]:
        """Parts of the summed gradients that over all ranks are every parameter once."""
        return [self.sums[stage].view(*part) for stage, flat in self.flats.items() for part in flat.counted]

    def scale(self, factor: float) -> None:
        """Multiply the summed gradients."""
        for stage, flat in self.flats.items():
            for part in flat.updated:
                self.sums[stage].view(*part).mul_(factor)

    # Computation.

    def compute(self, step: int, batch_of: Callable[[int], Batch], target_tokens: int) -> list[Timed]:
        """Forward and backward of this replica's microbatches, and the sums over all replicas. Collective."""
        return self._run(self.program, Feed(batch_of, self.numbers, step, target_tokens))

    def forward(self, total: int, batch_of: Callable[[int], Batch]) -> None:
        """Forward of `total` microbatches, shared out over the replicas, without dropout. Collective."""
        numbers = range(*self._block(total))
        self._run(self._forwards(-(-total // self.data.size), len(numbers)), Feed(batch_of, numbers))

    def results(self) -> Mapping[int, Tensor]:
        """The losses that this rank has computed, by microbatch; on ranks that have the last stage."""
        return {m: x for stage in self.stages.values() for m, x in stage.results.items()}

    def next_logits(self, tokens: Tensor) -> Tensor:  # (T,) -> (V,)
        """What may follow `tokens`: the logits, on every rank. Collective, and every replica computes the same."""
        tokens = tokens.to(self.device)
        batch = Batch(tokens[None], tokens[None], torch.arange(len(tokens), device=self.device), tokens[:1], len(tokens))
        self._run(self._forwards(1, 1), Feed(lambda _: batch, (0,), result=lambda logits, _: logits[0, -1].float()))
        found = self.results()
        logits = found[0] if found else torch.empty(self.vocab_size, device=self.device)
        self.pipeline.broadcast(logits, (len(self.cut) - 1) % self.pipeline.size)
        return logits

    def _forwards(self, count: int, present: int) -> list[Action]:
        parallel = self.config.parallel
        return lower(forward_only(parallel.pipeline, parallel.chunks, count)[self.pipeline.rank], len(self.cut), present)

    def _run(self, program: Sequence[Action], feed: Feed) -> list[Timed]:
        for stage in self.stages.values():
            stage.start(feed)
        return execute(program, self.stages, self.wire)


def meta_model(shape: Model, vocab_size: int) -> nn.Module:
    """The whole model without memory."""
    with torch.device("meta"):
        return build(shape, vocab_size)


def whole_model(shape: Model, vocab_size: int, device: torch.device) -> tuple[nn.Module, FlatParameters]:
    """The whole model on one rank, its parameters views of one flat vector, their values still zero."""
    model = meta_model(shape, vocab_size)
    flat = FlatParameters(resolve_layouts(shape, vocab_size, (shape.n_layers,)), device)
    flat.install(model)
    return model, flat


def draw(flat: FlatParameters, shape: Model, seed: int) -> None:
    """Initial values, by (seed, name, shape), of what this rank updates of a stage."""
    drawn: tuple[str, Tensor] = "", torch.empty(0)
    for piece, values in flat.pieces(flat.values).items():
        if drawn[0] != piece.name:
            whole = flat.layout.slots[piece.name][1].shape
            drawn = piece.name, initial_value(seed, piece.name, whole, initial_std(piece.name, shape)).flatten()
        values.copy_(drawn[1][piece.start : piece.stop])


def resolve_layouts(shape: Model, vocab_size: int, cut: Sequence[int]) -> dict[str, Layout]:
    """The layout of every parameter of the model whose stages have so many blocks each."""
    shapes = {name: tuple(p.shape) for name, p in meta_model(shape, vocab_size).named_parameters()}
    return resolve(shapes, tied(shape), partial(stage_of, cut=cut))


def autocast_of(dtype: str, device: torch.device) -> Autocast:
    """The context in which forward computes: bfloat16 by torch's autocast, or float32 as it is."""
    if dtype == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext
