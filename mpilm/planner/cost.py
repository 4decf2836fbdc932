"""How long a step takes in a layout: the seconds of every action, the pipeline simulated from them, and what comes after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mpilm.config import Config, Model
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import (
    attention_flops_per_token,
    block_matrices,
    block_numel,
    embedding_and_head_numel,
    saved_floats_per_token,
)
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import schedule
from mpilm.parallel.pipeline.simulate import simulate
from mpilm.planner.machine import Compute, Curve, Machine, Memory, Network, at, on
from mpilm.planner.memory import RETURNED_BYTES

FAMILY = {"llama": "llama", "qwen": "llama", "mixtral": "llama", "gpt2": "gpt2", "bert": "gpt2"}
"""Whose norms, activations and positions an architecture has: what is calibrated under that name."""
ROUNDS = 2  # of a pipeline's length: steps with more microbatches than this are prolonged, not simulated
Costs = tuple[tuple[tuple[str, int], float], ...]
KINDS = ("F", "B", "I", "W")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step, of the average rank: computing, waiting in the pipeline, talking, and the rest."""

    compute_s: float
    bubble_s: float
    communication_s: float
    update_s: float
    """Norm, clipping and optimizer."""
    fixed_s: float
    """What does not depend on the size of anything."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.bubble_s + self.communication_s + self.update_s + self.fixed_s

    @property
    def parts(self) -> dict[str, float]:
        return {
            "compute": self.compute_s,
            "bubble": self.bubble_s,
            "communication": self.communication_s,
            "update": self.update_s,
            "fixed": self.fixed_s,
        }


@dataclass(frozen=True)
class Setting:
    """A layout on a machine: `ranks_per_node` as they are placed, node after node."""

    config: Config
    vocab_size: int
    machine: Machine
    shape: MeshShape
    ranks_per_node: int
    cut: tuple[int, ...]

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.config.train.micro_batch * self.model.context_length

    @cached_property
    def rates(self) -> Compute:
        return self.machine.computing(self.ranks_per_node, self.config.train.dtype)

    @cached_property
    def streams(self) -> Memory:
        return self.machine.streaming(self.ranks_per_node)

    @cached_property
    def block(self) -> Mapping[str, float]:
        return block_s(self)

    @cached_property
    def ends(self) -> Mapping[str, float]:
        return ends_s(self)

    @cached_property
    def slowness(self) -> float:
        """Times that computing takes longer in training, and where ranks share a core, than parts of it alone."""
        kept = self.tokens * saved_floats_per_token(self.model, self.config.train.dtype)
        return self.crowding * at(self.rates.training, kept)

    @property
    def crowding(self) -> float:
        """How many times longer a rank takes than one that was measured: it has another part of the node's cores."""
        return self.ranks_per_node / self.rates.ranks if self.machine.device == "cpu" else 1.0

    def numel(self, stage: int) -> int:
        """Parameters that a stage has gradients for, both uses of a tied matrix counted."""
        first, last = embedding_and_head_numel(self.model, self.vocab_size)
        return self.cut[stage] * block_numel(self.model) + first * (stage == 0) + last * (stage == len(self.cut) - 1)

    @cached_property
    def stages(self) -> Sequence[range]:
        """The stages of each rank of a pipeline."""
        return [range(rank, len(self.cut), self.shape.pipeline) for rank in range(self.shape.pipeline)]

    # Networks. Ranks that differ along data are neighbours; those of a pipeline are a whole data axis apart.

    @property
    def data_within(self) -> bool:
        """Whether the replicas of a stage are all on one node."""
        return self.ranks_per_node % self.shape.data == 0 or self.shape.size <= self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Nodes that the replicas of a stage fill, each of them whole; 1 where they do not."""
        return self.shape.data // self.ranks_per_node if self.shape.data % self.ranks_per_node == 0 else 1

    @property
    def together(self) -> int:
        """Replicas of a stage that share a memory, on each node as many; 1 where they do not."""
        if self.data_within:
            return self.shape.data
        return self.ranks_per_node if self.shape.data % self.ranks_per_node == 0 else 1

    @property
    def data_network(self) -> Network | None:
        return self.machine.within if self.data_within else self.machine.across or self.machine.within

    @property
    def pipeline_network(self) -> Network | None:
        within = self.shape.size <= self.ranks_per_node
        return self.machine.within if within else self.machine.across or self.machine.within


# Computing.


def linear_s(setting: Setting, tokens: float, sides: tuple[int, int], backward: bool) -> float:
    """Of the product of so many rows with a matrix; backward is two products."""
    surface = setting.rates.linear_backward if backward else setting.rates.linear_forward
    flops = 2 * tokens * sides[0] * sides[1] * (1 + backward)
    return flops * on(surface, tokens, math.sqrt(sides[0] * sides[1]))


def block_s(setting: Setting) -> dict[str, float]:
    """Of one block and microbatch: forward, backward, and of it the weight gradients, which zero-bubble does apart."""
    model, tokens = setting.model, setting.tokens
    found = {"F": 0.0, "B": 0.0, "W": 0.0}
    for a, b, alike in block_matrices(model):
        met = min(alike, model.experts_per_token)
        each = tokens * met / alike  # of several experts each has its share of the tokens
        backward = alike * linear_s(setting, each, (a, b), backward=True)
        found["F"] += alike * linear_s(setting, each, (a, b), backward=False)
        found["B"] += backward
        found["W"] += backward / 2
    flops = tokens * attention_flops_per_token(model)
    core, kept = model.context_length, tokens * saved_floats_per_token(model, setting.config.train.dtype)
    family = FAMILY[model.arch]
    attention_f = flops / 3 * on(setting.rates.attention_forward, core, model.head_width)
    rest_f = kept * at(setting.rates.rest_forward[family], kept)
    found["F"] += attention_f + rest_f
    found["B"] += flops * 2 / 3 * on(setting.rates.attention_backward, core, model.head_width)
    found["B"] += kept * at(setting.rates.rest_backward[family], kept)
    found["B"] += {"none": 0.0, "attention": attention_f, "block": found["F"]}[setting.config.train.recompute]
    return {kind: seconds * setting.slowness for kind, seconds in found.items()}


def ends_s(setting: Setting) -> dict[str, float]:
    """The same of norm, head and loss; and "embed", the backward of the embedding."""
    tokens, vocab_size, width = setting.tokens, setting.vocab_size, setting.model.d_model
    logits, matrix = tokens * vocab_size, vocab_size * width
    backward = linear_s(setting, tokens, (width, vocab_size), backward=True) + _given_back_s(setting, matrix)
    forward = linear_s(setting, tokens, (width, vocab_size), backward=False) + _given_back_s(setting, logits)
    found = {
        "F": forward + logits * at(setting.rates.loss_forward, logits),
        "B": backward + logits * at(setting.rates.loss_backward, logits),
        "W": backward / 2,
        "embed": matrix * at(setting.streams.embedding, matrix),
    }
    return {kind: seconds * setting.slowness for kind, seconds in found.items()}


def _given_back_s(setting: Setting, numel: float) -> float:
    """Of memory that the C library gives back each time, since it is so large, and takes anew."""
    large = 4 * numel >= RETURNED_BYTES and setting.machine.device == "cpu"
    return numel * at(setting.streams.fresh, numel) if large else 0.0


def action_s(setting: Setting, kind: str, stage: int) -> float:
    """Of one microbatch in a stage, without messages."""
    block, ends, blocks = setting.block, setting.ends, setting.cut[stage]
    first, last = stage == 0, stage == len(setting.cut) - 1
    numel = setting.numel(stage)
    gathered = setting.crowding * numel * at(setting.streams.add, numel)  # into the sums
    if kind == "F":
        return blocks * block["F"] + last * ends["F"]
    whole = blocks * block["B"] + last * ends["B"] + first * ends["embed"] + gathered
    weights = blocks * block["W"] + last * ends["W"] + gathered
    return {"B": whole, "I": whole - weights, "W": weights}[kind]


# Talking.


def exchange_s(network: Network | None, ranks: int, numel: float) -> float:
    """Exchange the slices of a vector: each rank has its own of all ranks then."""
    return _moved_s(network, network.exchange, ranks, numel) if network is not None else 0.0


def gather_s(network: Network | None, ranks: int, numel: float) -> float:
    """Bring the slices of a vector to all ranks."""
    return _moved_s(network, network.gather, ranks, numel) if network is not None else 0.0


def _moved_s(network: Network, rates: Curve, ranks: int, numel: float) -> float:
    """Of all slices but a rank's own, with the messages beyond those that the rates were measured with."""
    if ranks == 1 or numel <= 0:
        return 0.0
    messages = math.ceil(numel / BUCKET) * max(0, ranks - network.ranks)
    return numel * (ranks - 1) / ranks * at(rates, numel) + messages * network.latency_s


def shared_s(network: Network, ranks: int, numel: float, gather: bool) -> float:
    """The sum in shared memory, of which each rank has its slice, or with `gather` all."""

    def passes(count: int, gathered: bool) -> float:  # of the whole vector through a rank: slices of all, then all slices
        return 1 + 1 / count + gathered * 2 * (count - 1) / count

    return numel * at(network.shared, numel) * passes(ranks, gather) / passes(network.ranks, True)


def reduce_s(setting: Setting, stage: int) -> float:
    """The sum of a stage's gradient over the replicas once a step (ZeRO 0 and 1)."""
    data, numel, network = setting.shape.data, setting.numel(stage), setting.data_network
    parallel = setting.config.parallel
    if data == 1 or network is None or parallel.zero >= 2:
        return 0.0
    if parallel.sync_every or parallel.compress:  # by the library's own sum, which moves as much as this exchange
        part = 1 / parallel.sync_every if parallel.sync_every else _thin(setting)
        return part * (exchange_s(network, data, numel) + gather_s(network, data, numel))
    if parallel.reduce != "sent" and setting.config.train.reproducible and setting.machine.within is not None:
        if setting.data_within and network.shared:
            return shared_s(network, data, numel, parallel.zero == 0)
        if setting.nodes > 1 and setting.machine.within.shared:
            return _by_nodes_s(setting, network, numel)
    half = 0.5 if parallel.wire_dtype == "bfloat16" else 1.0
    adding = numel * at(setting.streams.add, numel) * setting.crowding
    gathering = gather_s(network, data, numel) if parallel.zero == 0 else 0.0
    return half * (exchange_s(network, data, numel) + gathering) + adding


def _by_nodes_s(setting: Setting, network: Network, numel: float) -> float:
    """Within each node in shared memory, and then each rank its part of it across the nodes."""
    assert setting.machine.within is not None
    parallel, part = setting.config.parallel, numel / setting.ranks_per_node
    half = 0.5 if parallel.wire_dtype == "bfloat16" else 1.0
    gather = parallel.zero == 0
    across = exchange_s(network, setting.nodes, part) + gather * gather_s(network, setting.nodes, part)
    leaving = (network.ranks - 1) / max(1, network.ranks - setting.ranks_per_node)  # measured were messages within nodes too
    return shared_s(setting.machine.within, setting.ranks_per_node, numel, gather) + half * leaving * across


def _thin(setting: Setting) -> float:
    """The part of a gradient that travels when matrices are compressed."""
    rank, sides = setting.config.parallel.compress, block_matrices(setting.model)
    whole = sum(a * b * alike for a, b, alike in sides)
    return min(1.0, sum(rank * (a + b) * alike for a, b, alike in sides) / whole)


def _exposed_s(setting: Setting, stage: int) -> float:
    """What of the sum nobody computes beside: on a GPU it goes on while the last backward does, but for the last bucket."""
    whole = reduce_s(setting, stage)
    if setting.machine.device != "cuda" or setting.config.parallel.compress or setting.config.parallel.sync_every:
        return whole
    last = whole * min(1.0, BUCKET / setting.numel(stage))
    return max(last, whole - action_s(setting, "B", stage))


def round_s(setting: Setting, kind: str, stage: int) -> float:
    """What ZeRO-2 and 3 add to an action: the exchange of a microbatch's gradient, and the weights that are gathered."""
    zero, data, network, numel = setting.config.parallel.zero, setting.shape.data, setting.data_network, setting.numel(stage)
    found = 0.0
    if zero >= 2 and kind in ("B", "W"):
        half = 0.5 if setting.config.parallel.wire_dtype == "bfloat16" else 1.0
        found += half * exchange_s(network, data, numel) + numel * at(setting.streams.add, numel / data) * setting.crowding
    if zero == 3 and kind != "W":
        found += gather_s(network, data, numel) + numel * at(setting.streams.fresh, numel) * setting.crowding
    return found


def transfer_s(setting: Setting) -> float:
    """Of the activation of a microbatch, from one stage to the next."""
    network = setting.pipeline_network
    if network is None or setting.shape.pipeline == 1:
        return 0.0
    return network.latency_s + 4 * setting.tokens * setting.model.d_model / network.bandwidth


# The step.


def step_time(setting: Setting) -> StepTime:
    """What a step takes; its pipeline is simulated."""
    slowest = max(range(setting.shape.pipeline), key=lambda rank: _compute_s(setting, rank))
    busy = sum(_compute_s(setting, rank) for rank in range(setting.shape.pipeline)) / setting.shape.pipeline
    total, spoken = _pipeline_s(setting)
    reducing = max(sum(_exposed_s(setting, stage) for stage in theirs) for theirs in setting.stages)
    mine = sum(setting.numel(stage) for stage in setting.stages[slowest])
    return StepTime(
        compute_s=busy,
        bubble_s=max(0.0, total - busy - spoken),
        communication_s=spoken + reducing + _publish_s(setting, mine),
        update_s=max(_update_s(setting, sum(map(setting.numel, theirs))) for theirs in setting.stages),
        fixed_s=setting.machine.step_s + _agreement_s(setting),
    )


def _compute_s(setting: Setting, rank: int) -> float:
    """All forwards and backwards of a rank."""
    count = replica_microbatches(setting.config, setting.shape)
    return count * sum(action_s(setting, kind, stage) for stage in setting.stages[rank] for kind in "FB")


def _pipeline_s(setting: Setting) -> tuple[float, float]:
    """Seconds from the first forward to the last backward, and those that the average rank spends on messages of ZeRO."""
    count, pipeline = replica_microbatches(setting.config, setting.shape), setting.shape.pipeline
    spoken = sum(round_s(setting, kind, stage) for stages in setting.stages for stage in stages for kind in "FB") / pipeline
    if pipeline == 1:
        return _compute_s(setting, 0) + count * spoken, count * spoken
    few = count
    if count > (ROUNDS + 1) * pipeline:  # each further round of microbatches takes as long as the one before
        few = ROUNDS * pipeline + count % pipeline
    total = simulated_s(setting, few)
    if few < count:
        before = simulated_s(setting, few - pipeline)
        total += (count - few) / pipeline * (total - before)
    return total, count * spoken


def simulated_s(setting: Setting, count: int) -> float:
    """Of the pipeline, with so many microbatches."""
    parallel = setting.config.parallel
    costs = tuple(_costs(setting).items())
    return _step_s(parallel.schedule, parallel.pipeline, parallel.chunks, count, costs, transfer_s(setting))


@lru_cache(maxsize=1 << 12)  # layouts that differ in what comes after the pipeline only
def _step_s(name: str, pipeline: int, chunks: int, count: int, costs: Costs, transfer_s: float) -> float:
    compute = schedule(name, pipeline, chunks, count)
    programs = [lower(actions, pipeline * chunks) for actions in compute]
    known = dict(costs)
    return simulate(programs, lambda kind, stage: known.get((kind, stage), 0.0), transfer_s).step_s


def _costs(setting: Setting) -> dict[tuple[str, int], float]:
    """Seconds of each action, with the messages that ZeRO has in it."""
    return {
        (kind, stage): action_s(setting, kind, stage) + round_s(setting, kind, stage)
        for kind in KINDS
        for stage in range(len(setting.cut))
    }


def _update_s(setting: Setting, numel: int) -> float:
    """Norm, clipping and optimizer of a rank's stages."""
    streams, parallel = setting.streams, setting.config.parallel
    part = numel / setting.shape.data
    updated = part if parallel.zero else numel
    scaling = at(streams.scale, updated) if setting.config.train.clip_norm else 0.0
    each = part * at(streams.norm, part) + updated * (scaling + at(streams.adamw, updated))
    return each * setting.crowding


def _publish_s(setting: Setting, numel: int) -> float:
    """ZeRO-1 and 2 gather the weights after the update."""
    if setting.config.parallel.zero not in (1, 2):
        return 0.0
    return gather_s(setting.data_network, setting.shape.data, numel)


def _agreement_s(setting: Setting) -> float:
    """The loss and the norm of the gradient: three small sums over all ranks, whose time grows with the tree's height."""
    ranks, machine = setting.shape.size, setting.machine
    network = machine.within if ranks <= setting.ranks_per_node else machine.across or machine.within
    if ranks == 1 or network is None:
        return 0.0
    return 3 * network.reduce_s * math.log2(ranks) / max(1.0, math.log2(network.ranks))
