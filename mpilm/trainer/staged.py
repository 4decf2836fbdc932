"""A model whose stages lie on the ranks of the pipeline axis: the parameters of this rank's stages, and what runs them forward.

Everything that depends on the layout is here and in sharded.py; what is computed, on which data and for how long, is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.config import Config, Model, Train
from mpilm.data.batch import Batch
from mpilm.mesh.mesh import Mesh
from mpilm.model.cache import Cache
from mpilm.model.families import build, initial_std, tied
from mpilm.model.init import initial_value
from mpilm.model.lora import is_frozen
from mpilm.optim.optimizer import stays_whole
from mpilm.parallel.compiled import compile_blocks, compiled_token_losses
from mpilm.parallel.cut import keep_stage
from mpilm.parallel.deferred import Store, defer
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.gathered import GatheredParameters, ResidentParameters, gather_shards
from mpilm.parallel.layout import Layout, frozen, of_stage, owned, resolve, trained
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.execute import Wire, execute
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import forward_only
from mpilm.parallel.pipeline.stage import Feed, Gradients, ModelStage, NoGradients, token_losses
from mpilm.parallel.plan import stage_of
from mpilm.parallel.recompute import recompute
from mpilm.parallel.shard import Piece
from mpilm.parallel.tied import Ties
from mpilm.parallel.tree import block

Autocast = Callable[[], AbstractContextManager[object]]


class StagedModel:
    """`cut`: blocks of each stage. `alignment`: of the flat vectors, in elements, the same on all ranks.

    Collective over the mesh, as are the methods that say so. Parameters are zero until they are initialised or loaded.
    """

    def __init__(self, config: Config, mesh: Mesh, cut: Sequence[int], vocab_size: int, device: torch.device, alignment: int):
        self.config, self.mesh, self.cut, self.device = config, mesh, tuple(cut), device
        self.vocab_size, self.alignment = vocab_size, alignment
        self.pipeline, self.data = mesh.comm("pipeline"), mesh.comm("data")
        self.zero = config.parallel.zero
        self.layouts = resolve_layouts(config.model, vocab_size, cut, config.train.optimizer)
        self.flats: dict[int, FlatParameters] = {}
        self.frozen: dict[int, FlatParameters] = {}  # what is not trained, where there is any
        self.stages = {stage: self._stage(stage) for stage in range(self.pipeline.rank, len(cut), self.pipeline.size)}
        self.ties = Ties(trained(self.layouts), self.flats, self.pipeline)
        self.wire = Wire(self.pipeline)
        self.token_losses = compiled_token_losses() if config.train.compile else token_losses

    def _block(self, total: int) -> tuple[int, int]:
        return block(self.data.rank, self.data.size, total)

    def _stage(self, stage: int) -> ModelStage:
        config, last = self.config, len(self.cut) - 1
        model = meta_model(config.model, self.vocab_size)
        keep_stage(model, stage, self.cut)
        layouts, where = of_stage(self.layouts, stage), (self.data.rank, self.data.size, self.alignment)
        self.flats[stage] = flat = FlatParameters(trained(layouts), self.device, self.zero, *where)
        flats = [flat]
        if frozen(layouts):  # ZeRO-1 and 2 shard nothing that there is of these
            self.frozen[stage] = FlatParameters(frozen(layouts), self.device, 3 if self.zero == 3 else 0, *where)
            flats.append(self.frozen[stage])
        store, presence = Store(), ResidentParameters()
        if config.train.compile:
            compile_blocks(model)
        recompute(model, config.train.recompute)
        if config.parallel.schedule == "zero-bubble":
            defer(model, store)
        if self.zero == 3:
            presence = GatheredParameters(flats, model, self.data)
        else:
            for each in flats:
                each.install(model)
        return ModelStage(
            model, (stage == 0, stage == last), self._gradient_sum(stage, flat, model), presence, store,
            config.model.d_model, config.train.seed, autocast_of(config.train.dtype, self.device), self.device,
        )  # fmt: skip

    def _gradient_sum(self, stage: int, flat: FlatParameters, model: nn.Module) -> Gradients:
        """What collects the gradients of a stage; nothing, where nothing is trained."""
        return NoGradients()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that are optimized and saved, in the order of the model."""
        return {layout.name: layout.shape for layout in owned(trained(self.layouts))}

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that stay as they are."""
        return {layout.name: layout.shape for layout in owned(frozen(self.layouts))}

    @property
    def every_flat(self) -> list[FlatParameters]:
        """The flat vectors of this rank's stages."""
        return [*self.flats.values(), *self.frozen.values()]

    @property
    def held_numel(self) -> int:
        """Parameters whose values this rank holds for good: its stages, or with ZeRO-3 its shard of them."""
        return sum(piece.numel for flat in self.every_flat for piece in flat.layout.pieces(flat.values.intervals))

    # Values.

    def initialise(self) -> None:
        """Draw every parameter by (seed, name, shape). Collective."""
        for flat in self.frozen.values():
            draw(flat, self.config.model, self.config.train.seed)
        self.publish_frozen()
        self.initialise_trained()

    def initialise_trained(self) -> None:
        """Draw those that are trained. Collective."""
        for flat in self.flats.values():
            draw(flat, self.config.model, self.config.train.seed)
        self.publish()

    def publish(self) -> None:
        """Bring what each rank has updated to all ranks that use it. Collective."""
        self.ties.copy_values()
        if self.zero in (1, 2):
            for flat in self.flats.values():
                gather_shards(flat, self.data)

    def publish_frozen(self) -> None:
        """The same, once, for what is not trained. Collective."""
        Ties(frozen(self.layouts), self.frozen, self.pipeline).copy_values()

    def pieces(self) -> dict[Piece, Tensor]:
        """What this rank updates, as parts of parameters."""
        return _pieces(self.flats.values())

    def frozen_pieces(self) -> dict[Piece, Tensor]:
        """What this rank has of parameters that are not trained, to be filled before `publish_frozen`."""
        return _pieces(self.frozen.values())

    # Computation.

    def forward(
        self, total: int, batch_of: Callable[[int], Batch], result: Callable[[Tensor, Batch], Tensor] = token_losses
    ) -> None:
        """Forward of `total` microbatches, shared out over the replicas, without dropout. Collective."""
        numbers = range(*self._block(total))
        self._run(self._forwards(-(-total // self.data.size), len(numbers)), Feed(batch_of, numbers, result=result))

    def results(self) -> Mapping[int, Tensor]:
        """The losses that this rank has computed, by microbatch; on ranks that have the last stage."""
        return {m: x for stage in self.stages.values() for m, x in stage.results.items()}

    def next_logits(self, batches: Mapping[int, Batch], caches: Mapping[int, Cache]) -> Mapping[int, Tensor]:
        """What may follow each of this replica's texts: the logits (V,) by number, on the rank that has the last stage, and on
        others nothing. `caches`: of each text, on this rank. Collective over the pipeline axis."""
        numbers = list(batches)
        feed = Feed(batches.__getitem__, numbers, result=lambda logits, _: logits[0, -1].float(), caches=caches)
        self._run(self._forwards(len(numbers), len(numbers)), feed)
        return self.results()

    def _forwards(self, count: int, present: int) -> list[Action]:
        parallel = self.config.parallel
        return lower(forward_only(parallel.pipeline, parallel.chunks, count)[self.pipeline.rank], len(self.cut), present)

    def _run(self, program: Sequence[Action], feed: Feed) -> None:
        for stage in self.stages.values():
            stage.start(feed)
        execute(program, self.stages, self.wire, self.mesh.activity)


def _pieces(flats: Iterable[FlatParameters]) -> dict[Piece, Tensor]:
    return {piece: x for flat in flats for piece, x in flat.pieces(flat.values).items()}


def meta_model(shape: Model, vocab_size: int) -> nn.Module:
    """The whole model without memory."""
    with torch.device("meta"):
        return build(shape, vocab_size)


def draw(flat: FlatParameters, shape: Model, seed: int) -> None:
    """Initial values, by (seed, name, shape), of what this rank updates of a stage."""
    drawn: tuple[str, Tensor] = "", torch.empty(0)
    for piece, values in flat.pieces(flat.values).items():
        if drawn[0] != piece.name:
            whole = flat.layout.slots[piece.name][1].shape
            drawn = piece.name, initial_value(seed, piece.name, whole, initial_std(piece.name, shape)).flatten()
        values.copy_(drawn[1][piece.start : piece.stop])


def resolve_layouts(shape: Model, vocab_size: int, cut: Sequence[int], optimizer: str = Train.optimizer) -> dict[str, Layout]:
    """The layout of every parameter of the model whose stages have so many blocks each."""
    shapes = {name: tuple(p.shape) for name, p in meta_model(shape, vocab_size).named_parameters()}
    return resolve(
        shapes, tied(shape), partial(stage_of, cut=cut), stays_whole(optimizer), partial(is_frozen, model=shape)
    )  # fmt: skip


def autocast_of(dtype: str, device: torch.device) -> Autocast:
    """The context in which forward computes: bfloat16 by torch's autocast, or float32 as it is."""
    if dtype == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext
