"""The time of a training step in a layout: the seconds of each action, the pipeline simulated from them, and the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from mpilm.config.schema import ModelConfig
from mpilm.model.flops import attention_flops_per_token, block_matrices, model_part
from mpilm.ops.halving import count_message_rounds
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.layout_check import find_ulysses_problem, reduces_in_rounds
from mpilm.parallel.pipeline.schedules import lower, schedule
from mpilm.planner.layout import CALIBRATED_AS, PlacedLayout
from mpilm.planner.profile import ComputeRates, NetworkRates, interpolate, interpolate2d, total_s
from mpilm.planner.simulate import simulate

MMAP_THRESHOLD_BYTES = 32 << 20  # glibc returns larger tensors to the kernel as soon as they are freed
OPERATIONS: tuple[Literal["exchange"], Literal["gather"]] = "exchange", "gather"
WIRE_RATIO = {"float32": 1.0, "bfloat16": 0.5}  # bytes on the wire, relative to float32
SIMULATED_ROUNDS = 2  # microbatches in lengths of the pipeline: longer steps are extrapolated
ActionTimes = dict[tuple[str, int], float]  # seconds by kind and stage


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step on the average rank."""

    compute_s: float
    bubble_s: float
    communication_s: float
    update_s: float  # norm, clipping and optimizer
    fixed_s: float  # independent of every size

    @property
    def parts(self) -> dict[str, float]:
        return {name.removesuffix("_s"): seconds for name, seconds in vars(self).items()}

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


def linear_s(rates: ComputeRates, tokens: float, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the seconds of a matrix product, and of its backward, which is two products."""
    flops, side = 2 * tokens * inputs * outputs, math.sqrt(inputs * outputs)
    backward_s = 2 * flops * interpolate2d(rates.linear_backward, tokens, side)
    return flops * interpolate2d(rates.linear_forward, tokens, side), backward_s


def attention_s(rates: ComputeRates, model: ModelConfig, tokens: float) -> tuple[float, float]:
    """Return the seconds of the attention core of a block, forward and backward."""
    flops, sizes = tokens * attention_flops_per_token(model), (model.context_length, model.head_width)
    backward_s = flops * 2 / 3 * interpolate2d(rates.attention_backward, *sizes)
    return flops / 3 * interpolate2d(rates.attention_forward, *sizes), backward_s


def block_s(layout: PlacedLayout) -> tuple[float, float, float]:
    """Return the seconds of F, B and W for one block and microbatch; B includes W, which zero-bubble schedules split off."""
    rates, train, model = layout.compute_rates, layout.config.train, model_part(layout.rank_model, layout.parts)
    products_f = products_b = 0.0
    for inputs, outputs, copies in block_matrices(model):
        used = min(copies, model.experts_per_token)  # experts, which share the tokens
        forward_s, backward_s = linear_s(rates, layout.tokens * used / copies, inputs, outputs)
        products_f, products_b = products_f + copies * forward_s, products_b + copies * backward_s
    attention_f, attention_b = attention_s(rates, model, layout.tokens)
    family, saved = CALIBRATED_AS[model.arch], layout.saved_floats
    forward = layout.parts * (products_f + attention_f) + total_s(rates.rest_forward[family], saved)
    recomputed = {"none": 0.0, "attention": layout.parts * attention_f, "block": forward}[train.recompute]
    backward = layout.parts * (products_b + attention_b) + total_s(rates.rest_backward[family], saved) + recomputed
    return forward, backward, layout.parts * products_b / 2


def head_s(layout: PlacedLayout) -> tuple[float, float, float]:
    """Return the seconds of F, B and W for norm, head and loss of a microbatch."""
    rates, width, vocab_size = layout.compute_rates, layout.config.model.d_model, -(-layout.rank_vocab_size // layout.parts)
    logits, matrix = layout.tokens * vocab_size, vocab_size * width
    forward, backward = linear_s(rates, layout.tokens, width, vocab_size)
    forward, backward = forward + _page_fault_s(layout, logits), backward + _page_fault_s(layout, matrix)
    forward, loss_backward = forward + total_s(rates.loss_forward, logits), backward + total_s(rates.loss_backward, logits)
    return layout.parts * forward, layout.parts * loss_backward, layout.parts * backward / 2


def _page_fault_s(layout: PlacedLayout, numel: float) -> float:
    """Return the seconds of touching new pages, for a tensor that the C library returns to the kernel after each use."""
    returned = 4 * numel >= MMAP_THRESHOLD_BYTES and layout.machine.device == "cpu"
    return total_s(layout.memory_rates.fresh, numel) if returned else 0.0


def compute_s(layout: PlacedLayout) -> ActionTimes:
    """Return the seconds of each action on one microbatch, without messages."""
    model, times, block, head = layout.config.model, ActionTimes(), block_s(layout), head_s(layout)
    slowdown = layout.oversubscription * interpolate(layout.compute_rates.training, layout.saved_floats)  # against parts alone
    embedding_s = slowdown * total_s(layout.memory_rates.embedding, layout.rank_vocab_size * model.d_model)
    for stage, layers in enumerate(layout.cut):
        last, add_s = stage == len(layout.cut) - 1, layout.memory_s("add", layout.numel(stage))  # into the gradients
        forward, backward, weight = (slowdown * (layers * one + last * end) for one, end in zip(block, head))
        backward, weight = backward + (stage == 0) * embedding_s + add_s, weight + add_s
        times |= {("F", stage): forward, ("B", stage): backward, ("I", stage): backward - weight, ("W", stage): weight}
    return times


def collective_s(
    network: NetworkRates | None, operation: Literal["exchange", "gather"], ranks: int, numel: float, halving: bool = False
) -> float:
    """Return the seconds of exchanging or gathering the slices of a vector, of which a rank keeps its own: with all ranks at
    once, or by recursive halving."""
    if network is None or ranks == 1 or numel <= 0:
        return 0.0
    rounds = count_message_rounds(ranks) if halving else ranks - 1
    messages = math.ceil(numel / BUCKET) * max(0, rounds - network.ranks + 1)  # beyond those that the rates include
    return numel * (ranks - 1) / ranks * interpolate(getattr(network, operation), numel) + messages * network.latency_s


def shared_memory_s(network: NetworkRates, ranks: int, numel: float, gather: bool) -> float:
    """Return the seconds of a reduce-scatter in shared memory; with `gather`, of an all-reduce."""

    def passes(count: int, gathered: bool) -> float:  # over the whole vector by one rank: slices of all, then all slices
        return 1 + 1 / count + gathered * 2 * (count - 1) / count

    return total_s(network.shared, numel) * passes(ranks, gather) / passes(network.ranks, True)


def reduce_s(layout: PlacedLayout, stage: int) -> float:
    """Return the seconds of summing a stage's gradient over the replicas once a step (ZeRO 0 and 1)."""
    parallel, data, numel = layout.config.parallel, layout.replicas, layout.numel(stage)
    per_node = max(1, layout.ranks_per_node // layout.shape.tensor)  # replicas
    network, within = layout.network(layout.has_replicas_on_one_node), layout.machine.within
    if data == 1 or network is None or reduces_in_rounds(layout.config):
        return 0.0
    halving = parallel.wire_dtype == "float32"
    sent_s = collective_s(network, "exchange", data, numel, halving)
    gather_s = collective_s(network, "gather", data, numel, halving)
    if parallel.sync_every or parallel.powersgd_rank:  # MPI_Allreduce moves as much as an exchange and a gather
        return (sent_s + gather_s) * (1 / parallel.sync_every if parallel.sync_every else _compression_ratio(layout))
    gather, wire = parallel.zero == 0, WIRE_RATIO[parallel.wire_dtype]
    if parallel.reduce != "messages" and layout.config.train.reproducible and within is not None and within.shared:
        if layout.has_replicas_on_one_node:
            return shared_memory_s(within, data, numel, gather)
        if data % per_node == 0:  # each rank of a node exchanges its slice with its peers on the other nodes
            peers, part = data // per_node, numel / per_node
            exchange_s, gather_s = (collective_s(network, op, peers, part, halving) for op in OPERATIONS)
            across = exchange_s + gather * gather_s
            off_node = (network.ranks - 1) / max(1, network.ranks - per_node)  # the rates mix in messages within nodes
            return shared_memory_s(within, per_node, numel, gather) + wire * off_node * across
    return wire * (sent_s + gather * gather_s) + layout.memory_s("add", numel)


def _compression_ratio(layout: PlacedLayout) -> float:
    """Return the part of a gradient that PowerSGD sends."""
    rank, sides = layout.config.parallel.powersgd_rank, block_matrices(layout.config.model)
    full = sum(a * b * copies for a, b, copies in sides)
    return min(1.0, sum(rank * (a + b) * copies for a, b, copies in sides) / full)


def _exposed_reduce_s(layout: PlacedLayout, stage: int, backward_s: float) -> float:
    """Return the part of `reduce_s` that nothing hides: a GPU sums all but the last bucket during the last backward."""
    seconds, parallel = reduce_s(layout, stage), layout.config.parallel
    if layout.machine.device != "cuda" or parallel.powersgd_rank or parallel.sync_every:
        return seconds
    return max(seconds * min(1.0, BUCKET / layout.numel(stage)), seconds - backward_s)


def tensor_s(layout: PlacedLayout) -> ActionTimes:
    """Return the seconds of the large collectives of the tensor axis in each action. Attention and feed-forward layers gather
    their input and exchange their output; backward does both with gradients, and gathers inputs that were not kept."""
    tensor, train, times = layout.shape.tensor, layout.config.train, ActionTimes()
    network, numel = layout.network(layout.ranks_per_node % tensor == 0), layout.tokens * layout.config.model.d_model
    gather_s, exchange_s = (collective_s(network, operation, tensor, numel) for operation in ("gather", "exchange"))
    exchange_s += layout.memory_s("add", numel) if tensor > 1 else 0.0
    again_s = 0.0 if train.compile or train.recompute == "block" else gather_s
    repeated_s = gather_s + exchange_s if train.recompute == "block" else again_s
    for stage, layers in enumerate(layout.cut):
        first, last, layers_s = stage == 0, stage == len(layout.cut) - 1, 2 * layers * (gather_s + exchange_s)
        forward = layers_s + first * exchange_s + last * gather_s
        backward = layers_s + 2 * layers * repeated_s + first * gather_s + last * (exchange_s + again_s)
        times |= {("F", stage): forward, ("B", stage): backward, ("I", stage): backward, ("W", stage): 0.0}
    return times


def context_s(layout: PlacedLayout) -> ActionTimes:
    """Return the seconds in which attention exchanges keys and values, or heads, in each action; in a ring half of it is hidden
    behind products."""
    model, context, times = layout.rank_model, layout.shape.context, ActionTimes()
    network = layout.network(layout.ranks_per_node % (context * layout.shape.tensor) == 0)
    queries, keys = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    uses_heads = layout.config.parallel.context_method != "ring" and not find_ulysses_problem(layout.config)
    numel = layout.tokens * (2 * queries + 2 * keys if uses_heads else keys * context)
    forward = collective_s(network, "exchange", context, numel)
    for stage, layers in enumerate(layout.cut):
        backward = layers * forward * (1 + (not uses_heads) + (layout.config.train.recompute != "none"))
        times |= {("F", stage): layers * forward, ("B", stage): backward, ("I", stage): backward, ("W", stage): 0.0}
    return times


def expert_s(layout: PlacedLayout) -> ActionTimes:
    """Return the seconds in which tokens travel to their experts and back, in each action."""
    model, expert, times = layout.config.model, layout.shape.expert, ActionTimes()
    network = layout.network(layout.ranks_per_node % (expert * layout.shape.context * layout.shape.tensor) == 0)
    numel = layout.tokens * layout.parts * model.experts_per_token * model.d_model  # each tensor part exchanges its own
    both_ways_s = 2 * collective_s(network, "exchange", expert, numel)
    for stage, layers in enumerate(layout.cut):
        forward, backward = (n * layers * both_ways_s for n in (1, 1 + (layout.config.train.recompute == "block")))
        times |= {("F", stage): forward, ("B", stage): backward, ("I", stage): backward, ("W", stage): 0.0}
    return times


def zero_s(layout: PlacedLayout) -> ActionTimes:
    """Return the seconds that reduction in rounds, and ZeRO-3, add to each action: exchanging its gradient, gathering the
    parameters."""
    parallel, times = layout.config.parallel, ActionTimes()
    network = layout.network(layout.has_replicas_on_one_node)
    for stage in range(len(layout.cut)):
        exchange_s = gather_s = 0.0
        for numel, ranks in layout.vectors(stage):
            if reduces_in_rounds(layout.config):
                halving = parallel.wire_dtype == "float32"
                exchange_s += WIRE_RATIO[parallel.wire_dtype] * collective_s(network, "exchange", ranks, numel, halving)
                exchange_s += ranks * layout.memory_s("add", numel / ranks)
            if parallel.zero == 3:
                gather_s += collective_s(network, "gather", ranks, numel) + layout.memory_s("fresh", numel)
        times |= {("F", stage): gather_s, ("B", stage): gather_s + exchange_s, ("I", stage): gather_s, ("W", stage): exchange_s}
    return times


def step_time(layout: PlacedLayout) -> StepTime:
    """Predict the seconds of a step."""
    compute, zero, pipeline = compute_s(layout), zero_s(layout), layout.stages_of_rank
    for key, seconds in chain.from_iterable(each(layout).items() for each in (tensor_s, context_s, expert_s)):
        zero[key] += seconds  # all hold up the stage
    busy = [layout.microbatches * sum(compute[kind, stage] for stage in stages for kind in "FB") for stages in pipeline]
    busy_s = sum(busy) / len(busy)
    sharding_s = layout.microbatches * sum(zero[kind, stage] for kind, stage in zero if kind in "FB") / len(busy)
    gathered = pipeline[busy.index(max(busy))] if layout.config.parallel.zero in (1, 2) else ()  # after the update
    network = layout.network(layout.has_replicas_on_one_node)
    vectors = chain.from_iterable(map(layout.vectors, gathered))
    gather_s = sum(collective_s(network, "gather", ranks, numel) for numel, ranks in vectors)
    exposed_s = max(sum(_exposed_reduce_s(layout, stage, compute["B", stage]) for stage in stages) for stages in pipeline)
    agree_s, network = 0.0, layout.network(layout.ranks <= layout.ranks_per_node)
    if network is not None and layout.ranks > 1:  # three small all-reduces, for loss and norm, as high as their trees
        agree_s = 3 * network.reduce_s * math.log2(layout.ranks) / max(1.0, math.log2(network.ranks))
    return StepTime(
        compute_s=busy_s,
        bubble_s=max(0.0, _pipeline_s(layout, {key: compute[key] + zero[key] for key in compute}) - busy_s - sharding_s),
        communication_s=sharding_s + exposed_s + gather_s,
        update_s=max(_update_s(layout, stages) for stages in pipeline),
        fixed_s=layout.machine.step_s + agree_s,
    )


def _pipeline_s(layout: PlacedLayout, times: ActionTimes) -> float:
    """Return the seconds from the first forward to the last backward of the replica that has the most microbatches."""
    count, pipeline = layout.microbatches, layout.shape.pipeline
    if pipeline == 1:
        return count * sum(times[kind, stage] for kind, stage in times if kind in "FB")
    if count <= (SIMULATED_ROUNDS + 1) * pipeline:
        return simulated_s(layout, times, count)
    few = SIMULATED_ROUNDS * pipeline + count % pipeline
    few_s = simulated_s(layout, times, few)  # each further round of microbatches takes as long as the one before
    return few_s + (count - few) / pipeline * (few_s - simulated_s(layout, times, few - pipeline))


def simulated_s(layout: PlacedLayout, times: ActionTimes, microbatches: int) -> float:
    """Return the seconds of the pipeline with so many microbatches, simulated."""
    parallel, transfer_s, stages = layout.config.parallel, 0.0, len(layout.cut)
    network = layout.network(layout.ranks <= layout.ranks_per_node)
    if network is not None:  # the activations of a microbatch, to the next stage
        transfer_s = network.latency_s + 4 * layout.tokens * layout.config.model.d_model / network.bandwidth
    ranks = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
    programs = [lower(actions, stages) for actions in ranks]
    return simulate(programs, lambda kind, stage: times.get((kind, stage), 0.0), transfer_s).step_s


def _update_s(layout: PlacedLayout, stages: Sequence[int]) -> float:
    """Return the seconds of norm, clipping and optimizer for the stages of a rank."""
    shard = sum(map(layout.shard, stages))
    updated = shard if layout.config.parallel.zero else sum(map(layout.numel, stages))
    scale_s = layout.memory_s("scale", updated) if layout.config.train.clip_norm else 0.0
    return layout.memory_s("norm", shard) + scale_s + layout.memory_s("adamw", updated)
