"""The check of the computation itself: ranks recompute microbatches of other ranks, and every bit must be the same.

In a step that is checked, each rank takes digests of one microbatch, drawn by the seed: of the messages between stages, of the
loss and of the gradient of every parameter. Then every data-parallel rank computes the microbatch of the next one from the same
weights, with all other axes as in training, and compares. If digests differ, a third rank decides, or the same ranks once more
where there are only two. Where no other rank has the weights, each rank computes twice.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mpilm.comm.base import Request
from mpilm.comm.collective_errors import CollectiveError
from mpilm.data.batch import Batch
from mpilm.engine.hardware import processor_name
from mpilm.engine.train_model import TrainModel
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import name_ranks
from mpilm.model.layers import hash_key
from mpilm.parallel.digests import CAUSE, MODULUS, name_bit, read_sums, sum_bits
from mpilm.parallel.pipeline.stage import LOSS, RECEIVED_ACTIVATION, RECEIVED_GRADIENT, SENT_ACTIVATION

TAG = 7  # of messages with digests

Digests = Mapping[str, int]  # by "STAGE LABEL"
Computation = tuple[int, Digests]  # world rank whose microbatch it was, and the digests
OnFailure = Callable[[Sequence[int], Sequence[str], str], None]  # ranks, their hosts, text; called on all ranks


class Recheck:
    """Rechecks the computation of a model every `every` steps (0: never). `on_failure` is called before the error is raised."""

    def __init__(self, model: TrainModel, every: int, on_failure: OnFailure = lambda ranks, hosts, text: None):
        self.model, self.on_failure, ranks = model, on_failure, model.mesh.shape.data
        facts = [processor_name(), torch.get_num_threads(), model.device.type]
        is_uniform = all(other == facts for other in model.mesh.world.all_gather_json(facts))
        # GPU kernels may add in another order each time, and processors of another kind round otherwise.
        self.every = every if is_uniform and model.device.type == "cpu" else 0
        is_alone = ranks == 1 or model.is_local_sgd  # no other rank has these weights: this one computes twice
        # How far behind on the data axis the replicas are whose microbatch this rank computes: to recheck, and to decide.
        self.check, self.decide = int(not is_alone), (0,) if is_alone else (0, 1) if ranks == 2 else (2,)
        self.recorded: Digests = {}  # of the step that is checked

    def is_due(self, step: int) -> bool:
        return self.every > 0 and (step + 1) % self.every == 0

    @contextlib.contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Take digests of the microbatch drawn for this step while it is computed, if the step is checked."""
        if not self.is_due(step):
            yield
            return
        with self._taking_digests(self._draw(step, 0)) as sums:
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
            return
        computed += map(compute, self.decide)
        everyone = self.model.mesh.world.all_gather_json([socket.gethostname(), computed])
        ranks, text = self._decide(step, [rows for _, rows in everyone])
        hosts = list(dict.fromkeys(everyone[rank][0] for rank in ranks))
        text = f"step {step + 1}: {text} ({', '.join(hosts)}): {CAUSE}"
        self.on_failure(ranks, hosts, text)
        raise CollectiveError(RanksDisagreeError(text))

    def _draw(self, step: int, shift: int) -> list[int]:
        """Return the microbatch to check of the replica `shift` behind this one on the data axis; none if it has fewer."""
        model, place = self.model, hash_key("recheck", self.model.config.train.seed, step) % len(self.model.microbatches_of(0))
        replica = self._peer(shift)["data"] * model.mesh.shape.expert + model.mesh.coordinate["expert"]
        return list(model.microbatches_of(replica)[place : place + 1])

    def _peer(self, shift: int) -> dict[str, int]:
        """Return the coordinate of the rank `shift` behind this one on the data axis."""
        mesh = self.model.mesh
        return {**mesh.coordinate, "data": (mesh.coordinate["data"] + shift) % mesh.shape.data}

    def _compute(self, step: int, fetch: Callable[[int], Batch], target_tokens: int, shift: int) -> Computation:
        """Compute the drawn microbatch of the replica `shift` behind this one; return its rank and the digests. Collective."""
        drawn = self._draw(step, shift)
        with self._taking_digests(drawn) as sums:
            self.model.recompute(step, fetch, drawn, target_tokens)
        return self.model.mesh.shape.rank(self._peer(shift)), self._read(sums)

    @contextlib.contextmanager
    def _taking_digests(self, drawn: Sequence[int]) -> Iterator[dict[str, list[Tensor]]]:
        sums: dict[str, list[Tensor]] = {}

        def observe(stage: int, microbatch: int, label: str, x: Tensor) -> None:
            if microbatch in drawn:
                sums.setdefault(f"{stage} {label}", []).extend(sum_bits([x.detach()]))

        with self.model.observing(observe):
            yield sums

    def _read(self, sums: Mapping[str, list[Tensor]]) -> Digests:
        values = iter(read_sums([x for each in sums.values() for x in each]))
        totals = {key: sum(next(values) for _ in each) % MODULUS for key, each in sums.items()}
        return dict(sorted(totals.items()))

    def _shift_digests(self, own: Digests, keys: Sequence[str]) -> Digests:
        """Send own digests to the rank whose microbatch is rechecked by it; return those of the rank that is rechecked here."""
        if self.check == 0:
            return own
        comm, sent = self.model.mesh.comm("data"), torch.tensor([*own.values()], dtype=torch.int64, device="cpu")
        received = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        receive = comm.irecv(received, (comm.rank + self.check) % comm.size, TAG) if keys else Request()
        if own:
            comm.isend(sent, (comm.rank - self.check) % comm.size, TAG).wait()
        receive.wait()
        return dict(zip(keys, received.tolist()))

    def _decide(self, step: int, everyone: Sequence[Sequence[Computation]]) -> tuple[list[int], str]:
        """Return the ranks that computed wrongly, and text with the first tensor that differs, from the computations of all
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
        return sorted(set(ranks)), f"{texts[0]} was computed wrongly by {name_ranks(sorted(set(ranks)))}"

    def _order(self, key: str) -> tuple[int, int, int]:
        """Return the place of a digest in the order of computation: what is wrong first explains what follows."""
        stage, label = int(key.partition(" ")[0]), key.partition(" ")[2]
        if label in (RECEIVED_ACTIVATION, SENT_ACTIVATION, LOSS):
            return 0, stage, int(label != RECEIVED_ACTIVATION)
        return 1, -stage, int(label != RECEIVED_GRADIENT)

    def _describe(self, step: int, key: str, owner: int, bit: str) -> str:
        stage, _, label = key.partition(" ")
        what = f"the gradient of {label}" if label in self.model.layouts else f"{label} by stage {stage}"
        return f"{what}{f' ({bit})' if bit else ''}, microbatch of rank {owner},"


def _find_wrong(values: Sequence[tuple[int, int]]) -> tuple[list[int], str]:
    """Return the ranks whose value is not that of the others, and the bit that differs. `values`: rank and digest, first of the
    rank that had the microbatch, then of the one that rechecked it, then of those that decide."""
    (owner, first), (checker, second), (_, third), *more = values
    bit = name_bit(first - second)
    if second == third:
        return [owner], bit
    if first == third and (not more or more[0][1] == first):
        return [checker], bit
    return [owner, checker], bit  # two ranks that each insist
