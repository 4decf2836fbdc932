"""The check of the computation itself: ranks recompute microbatches of other ranks, and every bit must be the same.

In a step that is checked, each rank takes digests of one microbatch, drawn by the seed: of the messages between stages, of the
loss and of the gradient of every parameter. Then each rank computes what the next one on one axis has computed, with all other
axes as in training, and compares. On the data axis, ranks have the same weights. Without it, ranks change places on another
axis and send their weights. If digests differ, a third rank decides, or the same ranks once more where there are only two.
"""

import contextlib
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NoReturn

import torch
from torch import Tensor, nn

from mpilm.comm.base import Request
from mpilm.comm.collective_errors import CollectiveError
from mpilm.data.batch import Batch
from mpilm.engine.hardware import processor_name
from mpilm.engine.pipelined import PipelinedModel
from mpilm.engine.sum_check import Finding, SumCheck
from mpilm.engine.train_model import TrainModel
from mpilm.errors import RanksDisagreeError
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import AXES
from mpilm.model.layers import hash_key
from mpilm.optim.optimizer import UpdateSample
from mpilm.parallel.digests import CAUSE, HASH_MODULUS, hash_bits, name_bit, read_sums, sum_bits
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import FlatKey
from mpilm.parallel.pipeline.stage import LOSS, RECEIVED_ACTIVATION, RECEIVED_GRADIENT, SENT_ACTIVATION, GradientReducer
from mpilm.parallel.plan import copy_name

TAG = 7
SAMPLE_NUMEL = 1 << 18  # elements whose update is rechecked
GROUP_AXES = "tensor", "context", "expert"  # whose ranks exchange what they compute before it is compared

Digests = Mapping[str, int]  # by "STAGE LABEL"
Computation = tuple[int, Digests]  # world rank whose microbatch it was, and the digests
# (steps completed at the last good recheck, wrong ranks, their hosts, text) -> advice for the user. Called on all ranks.
OnFailure = Callable[[int, Sequence[int], Sequence[str], str], str]


class Recheck:
    """Rechecks the computation of a model every `every` steps (0: never). `on_failure` is called before the error is raised.
    `last_good`: the number of steps that had been completed at the last good recheck, or when the state was loaded."""

    def __init__(self, model: TrainModel, every: int, last_good: int = 0):
        self.model, self.last_good, shape = model, last_good, model.mesh.shape
        self.on_failure: OnFailure = lambda *_: ""
        facts = [processor_name(), torch.get_num_threads()]
        is_uniform = all(other == facts for other in model.mesh.world.all_gather_json(facts))
        self.obstacle = ""  # reason why bits may differ without an error, so that nothing is rechecked
        if model.device.type != "cpu":
            self.obstacle = "GPU kernels may add in another order each time"
        elif not is_uniform:
            self.obstacle = "the ranks have processors of different kinds, or different numbers of threads"
        self.every = 0 if self.obstacle else every
        # The axis on which ranks recheck each other, and how far behind on it the ranks are whose work this one repeats, to
        # recheck and to decide. A compiled model is not built again, nor are the weights of independent replicas the same.
        axes = [axis for axis in ("data", *AXES) if getattr(shape, axis) > 1]
        is_alone = not axes or model.is_local_sgd or (axes[0] != "data" and model.config.train.compile)
        self.axis = axes[0] if axes else "data"
        ranks = 1 if is_alone else getattr(shape, self.axis)
        self.check, self.decide = int(ranks > 1), (0,) if ranks == 1 else (0, 1) if ranks == 2 else (2,)
        self._meshes: dict[int, Mesh] = {}  # in which ranks have changed places, by how far
        self.recorded: Digests = {}  # of the step that is checked
        self.sum_check = SumCheck(model)

    def is_due(self, step: int) -> bool:
        return self.every > 0 and (step + 1) % self.every == 0

    @contextlib.contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Take digests of the microbatch drawn for this step while it is computed, if the step is checked."""
        if not self.is_due(step):
            yield
            return
        self.sum_check.begin(step)
        with self._taking_digests(self.model, self._draw(step, self.model.mesh.coordinate)) as sums:
            yield
        self.recorded = self._read(sums)

    def verify(self, step: int, fetch: Callable[[int], Batch], target_tokens: int) -> None:
        """Recompute the drawn microbatches on other ranks, if the step is checked. Before the update; collective over the mesh;
        raises CollectiveError naming ranks, hosts and tensors if a bit differs."""
        if not self.is_due(step):
            return
        compute = partial(self._compute, step, fetch, target_tokens)
        computed = [(self.model.mesh.rank, self.recorded), compute(self.check)]
        expected = self._shift_digests(self.recorded, list(computed[1][1]))
        differs = expected != computed[1][1]
        if not any(self.model.mesh.world.all_gather_json(differs)):
            if finding := self.sum_check.find_problem():
                self._fail(step, finding, self.model.mesh.world.all_gather_json(socket.gethostname()))
            self.last_good = step
            return
        computed += map(compute, self.decide)
        everyone = self.model.mesh.world.all_gather_json([socket.gethostname(), computed])
        self._fail(step, self._decide(step, [rows for _, rows in everyone]), [host for host, _ in everyone])

    @contextlib.contextmanager
    def verifying_update(self, step: int, lr: float) -> Iterator[None]:
        """If the step is checked, let the previous rank of the world repeat a part, drawn by the seed, of the update made
        meanwhile. Collective over the mesh; raises CollectiveError naming the rank if a bit differs."""
        if not self.is_due(step):
            yield
            return
        world, key = self.model.mesh.world, hash_key("recheck update", self.model.config.train.seed, step)
        draw = partial(self.model.optimizer.draw_sample, self.model.sums, key, SAMPLE_NUMEL)
        own = _copy_sample(draw())
        yield
        sample = draw()

        def read(pieces: Sequence[UpdateSample]) -> list[int]:
            return read_sums(sum_bits(x for piece in pieces for x in piece.updated))

        def repeat(pieces: Sequence[UpdateSample]) -> list[int]:
            copies = _copy_sample(pieces)
            self.model.optimizer.repeat_update(copies, lr)
            return read(copies)

        updated, others = read(sample), self._shift_sample(own)
        expected = world.all_gather_json(updated)[(world.rank + 1) % world.size]
        repeated = repeat(others)
        if not any(world.all_gather_json(repeated != expected)):
            self.last_good = step + 1
            return
        names = [piece.name for piece in sample for _ in piece.updated]
        rows = world.all_gather_json([names, updated, repeated, repeat(own), repeat(others), socket.gethostname()])
        for owner, (names, first, _, third, *_) in enumerate(rows):
            checker = (owner - 1) % world.size
            second, fourth = rows[checker][2], rows[checker][4]
            if first != second:
                place = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
                values = [(owner, first), (checker, second), (owner, third), (checker, fourth)]
                wrong, bit = _find_wrong([(rank, sums[place]) for rank, sums in values])
                what = f"the update of {names[place]}{f' ({bit})' if bit else ''}"
                self._fail(step, Finding(what, wrong), [row[-1] for row in rows])

    def _shift_sample(self, own: Sequence[UpdateSample]) -> list[UpdateSample]:
        """Send a sample to the previous rank of the world and return that of the next. Collective."""
        world = self.model.mesh.world
        facts = [[name, decays, [list(y.shape) for y in x], *more] for name, decays, x, *more in own]
        layouts = world.all_gather_json(facts)
        layout = layouts[(world.rank + 1) % world.size]
        if world.size == 1:
            return list(own)
        shapes = [shape for _, _, piece_shapes, *_ in layout for shape in piece_shapes]
        received = torch.empty(sum(map(prod, shapes)))
        receive = world.irecv(received, (world.rank + 1) % world.size, TAG) if layout else Request()
        if own:
            sent = torch.cat([x.flatten() for piece in own for x in piece.tensors])
            world.isend(sent, (world.rank - 1) % world.size, TAG).wait()
        receive.wait()
        tensors = (x.view(shape) for x, shape in zip(received.split([prod(shape) for shape in shapes]), shapes))
        return [UpdateSample(name, decays, [next(tensors) for _ in each], *more) for name, decays, each, *more in layout]

    def _fail(self, step: int, finding: Finding, hosts: Sequence[str]) -> NoReturn:
        """Report a wrong result on all ranks. Hosts are noted if it is clear which. Collective."""
        names = list(dict.fromkeys(hosts[rank] for rank in finding.ranks))
        text = f"step {step + 1}: {finding} ({', '.join(names)}): {CAUSE}"
        is_clear = len(names) == 1 or not finding.one_of_them
        advice = self.on_failure(self.last_good, finding.ranks, names if is_clear else [], text)
        raise CollectiveError(RanksDisagreeError(f"{text}. {advice}" if advice else text))

    def _draw(self, step: int, coordinate: Mapping[str, int]) -> list[int]:
        """Return the microbatch to check of the rank at this coordinate; none if it has fewer than others."""
        model, place = self.model, hash_key("recheck", self.model.config.train.seed, step) % self.model.longest_block
        replica = coordinate["data"] * model.mesh.shape.expert + coordinate["expert"]
        return list(model.microbatches_of(replica)[place : place + 1])

    def _peer(self, shift: int) -> dict[str, int]:
        """Return the coordinate of the rank `shift` behind this one on the axis."""
        mesh = self.model.mesh
        return {**mesh.coordinate, self.axis: (mesh.coordinate[self.axis] + shift) % getattr(mesh.shape, self.axis)}

    def _compute(self, step: int, fetch: Callable[[int], Batch], target_tokens: int, shift: int) -> Computation:
        """Compute the drawn microbatch of the rank `shift` behind this one; return that rank and the digests. Collective."""
        peer, model = self._peer(shift), self.model if self.axis == "data" or shift == 0 else self._build_mirror(shift)
        drawn, load = self._draw(step, peer), self.model.expert_load
        with self._taking_digests(model, drawn) as sums, load.paused() if load else contextlib.nullcontext():
            model.recompute(step, fetch, drawn, self.model.loss_divisor(target_tokens))
        return self.model.mesh.shape.rank(peer), self._read(sums)

    def _build_mirror(self, shift: int) -> PipelinedModel:
        """Return the part of the model that the rank `shift` behind this one has, with its weights. Collective."""
        model, mesh, comm = self.model, self.model.mesh, self.model.mesh.comm(self.axis)
        if shift not in self._meshes:
            world = mesh.world.split(0, mesh.shape.rank(self._peer(shift)), "recheck")
            self._meshes[shift] = Mesh(mesh.shape, world, mesh.recorder)
        facts = model.blocks_per_stage, model.vocab_size, model.device, model.alignment
        mirror = MirrorModel(model.config, self._meshes[shift], *facts)
        own, others = ([flat.values.tensor for flat in each.flat_parameters] for each in (model, mirror))
        receives = [comm.irecv(x, (comm.rank + shift) % comm.size, TAG) for x in others if x.numel()]
        sends = [comm.isend(x, (comm.rank - shift) % comm.size, TAG) for x in own if x.numel()]
        for request in (*receives, *sends):
            request.wait()
        mirror.refresh_parameters()
        return mirror

    @contextlib.contextmanager
    def _taking_digests(self, model: PipelinedModel, drawn: Sequence[int]) -> Iterator[dict[str, list[Tensor]]]:
        sums: dict[str, list[Tensor]] = {}

        def observe(stage: int, microbatch: int, label: str, x: Tensor) -> None:
            if microbatch in drawn:
                sums.setdefault(f"{stage} {label}", []).extend(hash_bits([x.detach()]))

        with model.observing(observe):
            yield sums

    def _read(self, sums: Mapping[str, list[Tensor]]) -> Digests:
        values = iter(read_sums([x for each in sums.values() for x in each]))
        totals = {key: sum(next(values) for _ in each) % HASH_MODULUS for key, each in sums.items()}
        return dict(sorted(totals.items()))

    def _shift_digests(self, own: Digests, keys: Sequence[str]) -> Digests:
        """Send own digests to the rank whose microbatch is rechecked by it; return those of the rank that is rechecked here."""
        if self.check == 0:
            return own
        comm, sent = self.model.mesh.comm(self.axis), torch.tensor([*own.values()], dtype=torch.int64, device="cpu")
        received = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        receive = comm.irecv(received, (comm.rank + self.check) % comm.size, TAG) if keys else Request()
        if own:
            comm.isend(sent, (comm.rank - self.check) % comm.size, TAG).wait()
        receive.wait()
        return dict(zip(keys, received.tolist()))

    def _decide(self, step: int, everyone: Sequence[Sequence[Computation]]) -> Finding:
        """Return the first tensor that differs, and the ranks that computed it wrongly, from the computations of all
        ranks: of the own microbatch, of the next replica's, and those that decide."""
        by_owner: dict[int, list[tuple[int, Digests]]] = {}
        for number in range(len(everyone[0])):
            for rank, rows in enumerate(everyone):
                owner, digests = rows[number]
                by_owner.setdefault(owner, []).append((rank, digests))
        suspects = []
        for owner, computations in by_owner.items():
            (_, first), (_, second), *_ = computations
            if keys := [key for key in first if first[key] != second.get(key)]:
                suspects.append((*min((self._order(key), key) for key in keys), owner))
        earliest = min(order for order, *_ in suspects)
        ranks, texts = list[int](), list[str]()
        for order, key, owner in suspects:
            if order != earliest:
                continue
            wrong, bit = _find_wrong([(rank, digests[key]) for rank, digests in by_owner[owner]])
            ranks += wrong
            texts.append(self._describe(step, key, owner, bit))
        shape, color = self.model.mesh.shape, partial(self.model.mesh.shape.color, axes=GROUP_AXES)
        groups = set(map(color, ranks))
        group = [rank for rank in range(shape.size) if color(rank) in groups]
        return Finding(texts[0], group, one_of_them=len(group) > len(groups))

    def _order(self, key: str) -> tuple[int, int, int]:
        """Return the place of a digest in the order of computation: what is wrong first explains what follows."""
        stage, label = int(key.partition(" ")[0]), key.partition(" ")[2]
        if label in (RECEIVED_ACTIVATION, SENT_ACTIVATION, LOSS):
            return 0, stage, int(label != RECEIVED_ACTIVATION)
        return 1, -stage, int(label != RECEIVED_GRADIENT)

    def _describe(self, step: int, key: str, owner: int, bit: str) -> str:
        stage, _, label = key.partition(" ")
        (microbatch,) = self._draw(step, self.model.mesh.shape.coordinate(owner))
        what = f"the gradient of {label}" if label in self.model.layouts else f"{label} by stage {stage}"
        what = label if label == LOSS else what
        return f"{what}{f' ({bit})' if bit else ''} in microbatch {microbatch}"


class MirrorModel(PipelinedModel):
    """The part of the model that another rank has, to compute once what that rank computes."""

    def make_reducer(self, key: FlatKey, flat: FlatParameters, model: nn.Module) -> GradientReducer:
        reducer = GradientReducer()
        names = [copy_name(name, copy) for name in flat.layout.spans for copy in range(flat.copies)]
        reducer.parameters = {name: model.get_parameter(name) for name in names}
        reducer.unit_names = [group.names[0] for group in flat.layout.groups]
        return reducer


def _copy_sample(sample: Sequence[UpdateSample]) -> list[UpdateSample]:
    return [piece._replace(tensors=[x.clone() for x in piece.tensors]) for piece in sample]


def _find_wrong(values: Sequence[tuple[int, int]]) -> tuple[list[int], str]:
    """Return the ranks whose value is not that of the others, and the bit that differs. `values`: rank and digest, first of the
    rank that had the microbatch, then of the one that rechecked it, then of those that decide."""
    (owner, first), (checker, second), (_, third), *_ = values
    bit, digests = name_bit(first - second), defaultdict[int, set[int]](set)
    for rank, digest in values:
        digests[rank].add(digest)
    inconsistent = [rank for rank, different in digests.items() if len(different) > 1]
    if 0 < len(inconsistent) < len(digests):  # they do not agree with themselves
        return inconsistent, bit
    if second == third:
        return [owner], bit
    if first == third and len(digests) > 2:
        return [checker], bit
    return [owner, checker], bit  # two ranks that each insist
