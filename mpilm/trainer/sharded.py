"""A model in training, shared out over the mesh: gradients and their sums, and the optimizer of what this rank updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from mpilm.config import Config, microbatches
from mpilm.data.batch import Batch
from mpilm.mesh.mesh import Mesh
from mpilm.optim.compressed import CompressedSum
from mpilm.optim.dealt import DealtSum
from mpilm.optim.norm import compiled_row_words, global_norm
from mpilm.optim.optimizer import Optimizer, moment_shapes
from mpilm.optim.outer import Outer
from mpilm.optim.reduce import BlockSum, MakeWay
from mpilm.optim.sent import Nothing
from mpilm.optim.way import faster
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import of_stage, owned, trained
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import schedule
from mpilm.parallel.pipeline.stage import Feed
from mpilm.parallel.shard import FlatLayout, Piece, holders
from mpilm.parallel.tree import dealt
from mpilm.trainer.staged import StagedModel


class ShardedModel(StagedModel):
    """A StagedModel with gradients and an optimizer, sharded over the data axis as `parallel.zero` says."""

    def __init__(self, config: Config, mesh: Mesh, cut: Sequence[int], vocab_size: int, device: torch.device, alignment: int):
        self.gradients: dict[int, BlockSum | DealtSum] = {}
        self.row_words = compiled_row_words() if config.train.compile and device.type == "cuda" else None
        self.tried: dict[str, float] = {}
        """Seconds of the ways to sum a gradient, where they have been tried."""
        self._elsewhere: dict[int, FlatLayout] = {}
        super().__init__(config, mesh, cut, vocab_size, device, alignment)
        total = microbatches(config)
        self.numbers = dealt(self.data.rank, self.data.size, total) if self.zero >= 2 else range(*self._block(total))
        """The microbatches of this replica, in the order in which it computes them."""
        parallel = config.parallel
        outer = Outer(self.flats, self.data, parallel.sync_every) if self.apart else None
        self.optimizer = Optimizer(self.flats, config.train, outer)
        actions = schedule(
            parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatches(config, mesh.shape)
        )[self.pipeline.rank]  # fmt: skip
        self.program = lower(actions, len(cut), len(self.numbers))

    @property
    def apart(self) -> bool:
        """Whether replicas train by themselves, and meet now and then."""
        return self.config.parallel.sync_every > 0

    def met(self, done: int) -> bool:
        """Whether all replicas are at one place after so many steps."""
        outer = self.optimizer.outer
        return outer is None or outer.due(done, self.config.train.steps)

    def _gradient_sum(self, stage: int, flat: FlatParameters, model: nn.Module) -> BlockSum | DealtSum:
        total, train, parallel = microbatches(self.config), self.config.train, self.config.parallel
        if self.zero >= 2:
            self.gradients[stage] = DealtSum(flat, model, self.data, total, parallel.wire_dtype)
        else:
            overlap, shared = self.device.type == "cuda", self._way(flat) == "shared"
            self.gradients[stage] = BlockSum(
                flat, model, self.data, total, train.reproducible, overlap, shared, parallel.wire_dtype, self._other_way(flat)
            )  # fmt: skip
        return self.gradients[stage]

    def _other_way(self, flat: FlatParameters) -> MakeWay | None:
        """What sums gradients that are not all sent."""
        if self.apart:
            return lambda sums: Nothing()
        if self.config.parallel.compress and self.data.size > 1:
            return lambda sums: CompressedSum(self.data, flat, sums, self.config.parallel.compress, self.config.train.seed)
        return None

    def _way(self, flat: FlatParameters) -> str:
        """How the replicas add their gradients: as stated, or the faster. Collective."""
        parallel = self.config.parallel
        if parallel.reduce == "auto" and parallel.wire_dtype != "float32":
            return "shared"  # what is sent is rounded: a stopwatch must not decide that
        if self._other_way(flat) or parallel.reduce != "auto" or self.device.type != "cpu" or self.data.size == 1:
            return parallel.reduce
        way, tried = faster(self.data, flat.layout.numel, self.zero == 0, parallel.wire_dtype)
        self.tried = self.tried or tried
        return way

    @property
    def moment_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Global shapes of all moments, by kind and parameter."""
        layouts = {layout.name: layout for layout in owned(trained(self.layouts))}
        return moment_shapes(self.config.train.optimizer, layouts, self.apart)

    @property
    def saved_bytes(self) -> int:
        """Bytes of a whole checkpoint's tensors."""
        of_moments = [shape for shapes in self.moment_shapes.values() for shape in shapes.values()]
        return 4 * sum(map(prod, [*self.shapes.values(), *of_moments]))

    def holders(self, name: str) -> list[tuple[int, int, list[int]]]:
        """Ranges of a parameter's elements, and the ranks of the world that update each. Pure, the same on all ranks."""
        stage, shape = self.layouts[name].stage, self.mesh.shape
        if stage not in self._elsewhere:
            layouts = trained(of_stage(self.layouts, stage)).values()
            self._elsewhere[stage] = FlatLayout(layouts, self.alignment, apart=self.zero >= 2, ranks=self.data.size)
        flat = self._elsewhere[stage]
        place = {**dict.fromkeys(self.mesh.coordinate, 0), "pipeline": stage % self.pipeline.size}
        return [
            (start, stop, [shape.rank({**place, "data": data}) for data in ranks])
            for start, stop, ranks in holders(name, flat, self.zero > 0, one=self.apart)
        ]

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights, moments, partial sums of gradients and what their exchange needs, on this rank; passing: of weights
        and gradients that are whole only while they are used."""
        weights = 4 * sum(flat.values.tensor.numel() for flat in self.every_flat)
        found = {"weights": weights, "moments": self.optimizer.held_bytes, "gradients": 0, "exchange": 0, "passing": 0}
        for stage, gradients in self.gradients.items():
            found["passing"] = max(found["passing"], self.stages[stage].presence.held_bytes)
            for part, count in gradients.held_bytes.items():
                found[part] += count
        return found

    @property
    def shared_bytes(self) -> int:
        """Bytes of gradients that lie where the other ranks of the node see them."""
        return sum(of.held_bytes["gradients"] for of in self.gradients.values() if isinstance(of, BlockSum) and of.shared)

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

    def norm(self) -> float:
        """Of the gradient; where replicas are apart, the largest of theirs. Collective over the mesh."""
        if not self.apart:
            return global_norm(self.counted(), self.mesh.world, self.row_words)
        mine = [self.sums[stage].view(*part) for stage, flat in self.flats.items() for part in flat.updated]
        largest = torch.tensor([global_norm(mine, self.pipeline, self.row_words)], dtype=torch.float64, device="cpu")
        self.data.all_reduce(largest, "max")
        return float(largest)

    def meet(self) -> None:
        """Bring replicas that are apart together. Collective over the mesh."""
        if self.optimizer.outer is not None:
            self.optimizer.outer.meet()
            self.publish()

    def forget(self) -> None:
        """Another state has been loaded: what belonged to the one before is of no use."""
        if self.optimizer.outer is not None:
            self.optimizer.outer.before.clear()
        for gradients in self.gradients.values():
            gradients.forget()

    def compute(self, step: int, batch_of: Callable[[int], Batch], target_tokens: int) -> None:
        """Forward and backward of this replica's microbatches, and the sums over all replicas. Collective."""
        if self.apart:  # the mean over this replica's own
            target_tokens = max(1, target_tokens * len(self.numbers) // microbatches(self.config))
        self._run(self.program, Feed(batch_of, self.numbers, step, target_tokens, self.token_losses))
