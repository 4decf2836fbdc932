"""A parallel layout on a machine: the sizes of what each rank computes and holds, and the rates that apply to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mpilm.config.schema import Config, ModelConfig, tensor_part_count
from mpilm.errors import FileError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import experts_numel, model_part, saved_floats_per_token, stage_numel
from mpilm.parallel.layout_check import replica_microbatch_count
from mpilm.planner.profile import ComputeRates, MachineProfile, MemoryRates, NetworkRates, total_s

CALIBRATED_AS = {  # those with the same norms
    "llama": "llama", "qwen": "llama", "mixtral": "llama", "qwen-moe": "llama", "gpt2": "gpt2", "bert": "gpt2"
}  # fmt: skip


@dataclass(frozen=True)
class PlacedLayout:
    """A parallel layout on a machine whose nodes are filled with ranks one after the other. Ranks that differ along the tensor
    axis are neighbours, then those along the context, expert and data axes; those of a pipeline are farthest apart."""

    config: Config
    vocab_size: int
    machine: MachineProfile
    shape: MeshShape
    ranks_per_node: int
    cut: tuple[int, ...]  # layers of each stage

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank, before the tensor axis divides them."""
        return self.config.train.micro_batch * self.config.model.context_length // self.shape.context

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed and ZeRO shards, but for experts: those of data, expert and context axes."""
        return self.shape.replicas * self.shape.context

    @property
    def step_tokens(self) -> int:
        return self.config.train.global_batch * self.config.model.context_length

    @property
    def ranks(self) -> int:
        return self.shape.size

    @property
    def saved_floats(self) -> float:
        """Floats of a microbatch that a block saves for backward on a rank."""
        return self.tokens * saved_floats_per_token(self.config.model, self.config.train.dtype) / self.shape.tensor

    @property
    def microbatches(self) -> int:
        """Microbatches of the replica that has the most."""
        return replica_microbatch_count(self.config, self.shape)

    @cached_property
    def stages_of_rank(self) -> Sequence[range]:
        """The stages of each rank of a pipeline."""
        return [range(rank, len(self.cut), self.shape.pipeline) for rank in range(self.shape.pipeline)]

    @property
    def parts(self) -> int:
        """Number of tensor parts on a rank."""
        return tensor_part_count(self.config) // self.shape.tensor

    @cached_property
    def rank_model(self) -> ModelConfig:
        """The model with a rank's share of the heads and of the feed-forward width."""
        return model_part(self.config.model, self.shape.tensor)

    @property
    def rank_vocab_size(self) -> int:
        return -(-self.vocab_size // self.shape.tensor)

    def numel(self, stage: int) -> int:
        """Return the gradient elements of a stage on a rank."""
        whole = stage_numel(self.rank_model, self.rank_vocab_size, self.cut[stage], stage == 0, stage == len(self.cut) - 1)
        return whole - self.expert_numel(stage) * (self.shape.expert - 1)

    def expert_numel(self, stage: int) -> int:
        """Return how many of them are those of divided experts."""
        return self.cut[stage] * experts_numel(self.rank_model) // self.shape.expert * (self.shape.expert > 1)

    def vectors(self, stage: int) -> list[tuple[int, int]]:
        """Return the elements of each flat vector of a stage on a rank, and the number of ranks that sum their gradients."""
        experts = self.expert_numel(stage)
        divided = [(experts, self.replicas // self.shape.expert)] if experts else []
        return [(self.numel(stage) - experts, self.replicas), *divided]

    def shard(self, stage: int) -> float:
        """Return the elements of a stage that ZeRO leaves to a rank."""
        return sum(numel / ranks for numel, ranks in self.vectors(stage))

    @cached_property
    def compute_rates(self) -> ComputeRates:
        """The rates measured with the nearest number of ranks on a node."""
        dtype = "float32" if self.config.train.dtype == "float32" else "bfloat16"  # float16 takes as long
        family = CALIBRATED_AS[self.config.model.arch]
        complete = [each for each in self.machine.compute if family in each.rest_forward and family in each.rest_backward]
        rates = [each for each in complete if each.dtype == dtype]
        if not rates:
            raise FileError(f"{self.machine.source} holds no rates for {dtype} and {family}: run mpilm.doctor --calibrate")
        return min(rates, key=self._distance)

    @cached_property
    def memory_rates(self) -> MemoryRates:
        """The rates measured with the nearest number of ranks on a node."""
        return min(self.machine.memory, key=self._distance)

    def _distance(self, rates: ComputeRates | MemoryRates) -> float:
        return abs(math.log(rates.ranks / max(1, self.ranks_per_node)))

    @property
    def oversubscription(self) -> float:
        """Slowdown of a rank that has another share of the node's cores than the ranks that were measured."""
        return self.ranks_per_node / self.compute_rates.ranks if self.machine.device == "cpu" else 1.0

    def memory_s(self, operation: str, numel: float) -> float:
        """Return the seconds of an operation, named by a field of MemoryRates, on vectors of so many elements."""
        return self.oversubscription * total_s(getattr(self.memory_rates, operation), numel)

    @property
    def has_replicas_on_one_node(self) -> bool:
        """True if all replicas of a stage are on one node."""
        return self.ranks_per_node % (self.replicas * self.shape.tensor) == 0 or self.ranks <= self.ranks_per_node

    @property
    def replicas_sharing_memory(self) -> int:
        """Replicas of a stage on each node; 1 if nodes have unequal numbers of them."""
        if self.has_replicas_on_one_node:
            return self.replicas
        on_node = self.ranks_per_node // self.shape.tensor
        return on_node if on_node and self.replicas % on_node == 0 and self.ranks_per_node % self.shape.tensor == 0 else 1

    def network(self, one_node: bool) -> NetworkRates | None:
        """Return the network between ranks of one node, or of several."""
        return self.machine.within if one_node else self.machine.across or self.machine.within
