"""The check of the sum of gradients over microbatches and ranks: all ranks add a drawn part of it again, from its leaves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.engine.train_model import TrainModel
from mpilm.formatting import name_ranks
from mpilm.model.layers import hash_key
from mpilm.ops.tree import Interval, TreeNode
from mpilm.parallel.digests import hash_bits, name_bit, read_sums
from mpilm.parallel.flat_layout import FlatLayout, intersect_intervals
from mpilm.parallel.layout import FlatKey
from mpilm.parallel.reduce.record import GradientRecord, Nodes, add_nodes

SAMPLE_NUMEL = 1 << 18  # elements of a flat vector that are added again, times the leaves of each


class Finding(NamedTuple):
    """A wrong result: what it is, the world ranks that computed it, and whether only one of them need be wrong."""

    what: str
    ranks: Sequence[int]
    one_of_them: bool = False

    def __str__(self) -> str:
        one_of, together = ("one of ", ", which compute together") if self.one_of_them else ("", "")
        return f"{self.what} was computed wrongly by {one_of}{name_ranks(self.ranks)}{together}"


class Addition(NamedTuple):
    """One sum that ranks have made, of elements of one parameter: its value, added again; the digests of what they have, by
    rank; its elements; and the rank that has added the nodes of all ranks, if it is the sum over them."""

    value: Tensor
    added: Mapping[int, int]
    interval: Interval
    owner: int | None = None


class SumCheck:
    """Records drawn elements of each flat vector while a step is computed, and adds them again."""

    def __init__(self, model: TrainModel):
        self.model, parallel = model, model.config.parallel
        is_rounded = parallel.wire_dtype != "float32" or parallel.powersgd_rank > 0
        self.is_possible = model.config.train.reproducible and not is_rounded and not model.is_local_sgd

    def begin(self, step: int) -> None:
        """Let the reducers record the elements drawn for this step."""
        number = hash_key("recheck sum", self.model.config.train.seed, step)
        for key, reducer in self.model.reducers.items() if self.is_possible else ():
            most = max(1, SAMPLE_NUMEL // self.model.leaf_count)
            reducer.record = GradientRecord(draw_interval(self.model.flats[key].layout.numel, number, most))

    def find_problem(self) -> Finding | None:
        """Add the recorded elements again and compare. Collective over the mesh; the same result on all ranks."""
        own = []
        for key, reducer in sorted(self.model.reducers.items()):
            if reducer.record is not None:
                own.append(self._check(key, reducer.record))
                reducer.record = None
        everyone = self.model.mesh.world.all_gather_json([finding for finding in own if finding])
        return next((Finding(*finding) for findings in everyone for finding in findings), None)

    def _check(self, key: FlatKey, record: GradientRecord) -> Finding | None:
        """Check one flat vector. Collective over the ranks that sum it."""
        flat, total = self.model.flats[key], self.model.leaf_count
        nodes, pieces = sorted(record.nodes), _list_pieces(flat.layout, record.interval)
        spans = intersect_intervals([record.interval], [flat.layout.padded_span(name) for name in flat.layout.spans])
        own = [i for i, (owner, _) in enumerate(pieces) if flat.zero == 0 or owner == flat.comm.rank]
        sums = dict(zip(own, _hash([self._read_sum(key, record, pieces[i][1]) for i in own])))
        node_digests = [_hash([record.cut(record.nodes[node], *span) for span in spans]) for node in nodes]
        facts = self.model.mesh.rank, sorted(record.leaves), nodes, node_digests, [*sums.items()]
        everyone = flat.comm.all_gather_json(facts)
        leaves = _gather_leaves(flat.comm, record, [row[1] for row in everyone])
        additions = list[Addition]()
        for rank, (_, _, nodes, node_digests, _) in enumerate(everyone):
            for node, digests in zip(nodes, node_digests):
                x = add_nodes(_select(leaves, node), total)
                additions += [Addition(record.cut(x, *span), {rank: one}, span) for span, one in zip(spans, digests)]
        whole = add_nodes(leaves, total)
        for i, (owner, piece) in enumerate(pieces):
            added = {rank: digest for rank, (*_, held) in enumerate(everyone) for number, digest in held if number == i}
            additions.append(Addition(record.cut(whole, *piece), added, piece, owner))
        again = flat.comm.all_gather_json(_hash([each.value for each in additions]))
        for each, digests in zip(additions, zip(*again)):
            wrong, bit = judge(digests, each.added)
            if wrong:
                return self._describe(key, each, wrong, f" ({bit})" if bit else "", [row[0] for row in everyone])
        return None

    def _describe(
        self, key: FlatKey, addition: Addition, wrong: Sequence[int], bit: str, world_ranks: Sequence[int]
    ) -> Finding:
        name = next((each.name for each in self.model.flats[key].layout.param_slices([addition.interval])), "padding")
        what = f"the sum of the gradients of {name}{bit}"
        if addition.owner is not None and set(wrong) == set(addition.added):  # nobody has it right
            if self.model.reducers[key].adds_in_stages:
                return Finding(what, world_ranks, one_of_them=True)
            wrong = [addition.owner]
        return Finding(what, [world_ranks[rank] for rank in wrong])

    def _read_sum(self, key: FlatKey, record: GradientRecord, piece: Interval) -> Tensor:
        """Return a piece of the sum as the optimizer will use it, or as it was before the gradient of a tied parameter was
        added, or a scaled gradient divided."""
        layout = self.model.flats[key].layout
        tied = sorted(layout.padded_span(name) for name, (_, each) in layout.spans.items() if each.is_tied)
        is_changed = self.model.loss_scale != 1.0 or intersect_intervals(tied, [piece])
        return record.cut(record.sum, *piece) if is_changed else self.model.sums[key].view(*piece)


def judge(again: Sequence[int], added: Mapping[int, int]) -> tuple[list[int], str]:
    """Return the ranks that added wrongly, and the bit that differs. `again`: the digests of the same sum by all ranks;
    `added`: those of the ranks that added it before."""
    truth, votes = Counter(again).most_common(1)[0]
    if 2 * votes <= len(again):  # of two ranks that differ now, the one is right with whom the other agreed before
        agreed = [digest for rank, digest in enumerate(again) if any(x == digest for i, x in added.items() if i != rank)]
        if not agreed:
            return list(range(len(again))), ""
        truth = agreed[0]
    digests = [*enumerate(again), *added.items()]
    wrong = [(rank, digest) for rank, digest in digests if digest != truth]
    return sorted({rank for rank, _ in wrong}), name_bit(wrong[0][1] - truth) if wrong else ""


def draw_interval(numel: int, number: int, most: int) -> Interval:
    """Return at most so many of `numel` elements, drawn by a number."""
    first = number % -(-numel // most) * most
    return first, min(first + most, numel)


def _list_pieces(layout: FlatLayout, interval: Interval) -> list[tuple[int, Interval]]:
    """Return the parts of an interval that belong to one parameter and that one rank owns, each with that rank."""
    buckets = [bucket for bucket in layout.buckets if intersect_intervals([bucket], [interval])]
    slices = [(rank, layout.slice(bucket, rank)) for bucket in buckets for rank in range(layout.ranks)]
    drawn = intersect_intervals([interval], [layout.padded_span(name) for name in layout.spans])
    return [(rank, piece) for rank, each in slices for piece in intersect_intervals([each], drawn)]


def _gather_leaves(comm: Comm, record: GradientRecord, leaves: Sequence[Sequence[Sequence[int]]]) -> Nodes:
    """Return the recorded leaves of all ranks. `leaves`: those that each rank has. Collective."""
    numel = record.interval[1] - record.interval[0]
    own = [record.leaves[node] for node in sorted(record.leaves)]
    counts = [len(each) * numel for each in leaves]
    gathered = torch.empty(sum(counts))
    comm.all_gather(torch.cat(own) if own else torch.empty(0), gathered, counts)
    rows = iter(gathered.view(-1, numel))
    return {(start, stop): next(rows) for each in leaves for start, stop in each}


def _select(leaves: Nodes, node: TreeNode) -> Nodes:
    return {leaf: x for leaf, x in leaves.items() if node[0] <= leaf[0] < node[1]}


def _hash(tensors: Sequence[Tensor]) -> list[int]:
    return read_sums(hash_bits(tensors))
