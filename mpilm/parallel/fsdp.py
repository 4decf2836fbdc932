"""Sharded parameters, unsharded only while they are in use (ZeRO-3; Rajbhandari et al., arXiv 1910.02054, section 5.3).

Each FSDP unit of the model (a block, the embedding, ...) is all-gathered before its forward and before its backward, while the
unit before it computes, and released afterwards. Autograd saves views of a unit's parameters, which point into the
released memory; they see the values of the next gather.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor, nn

from mpilm.comm.base import Request
from mpilm.kernels.linear_cross_entropy import DeferredLogits
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.pipeline.stage import StageParameters
from mpilm.parallel.plan import fsdp_unit
from mpilm.parallel.tensor import PartLogits

GATHERS_IN_FLIGHT = 2


class ReleasableBuffer:
    """A float32 tensor whose memory is released between uses and reappears at the same address with other values. On a CPU it
    releases pages to the kernel (MADV_DONTNEED): malloc mostly keeps what is freed."""

    def __init__(self, numel: int, device: torch.device):
        self.nbytes = 4 * numel
        self._pages = mmap(-1, self.nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS) if device.type == "cpu" else None
        self.tensor = torch.frombuffer(self._pages, dtype=torch.float32) if self._pages else torch.empty(numel, device=device)

    def acquire(self) -> None:
        if self._pages is None:
            self.tensor.untyped_storage().resize_(self.nbytes)

    def release(self) -> None:
        if self._pages is None:
            self.tensor.untyped_storage().resize_(0)
        else:
            self._pages.madvise(MADV_DONTNEED)


class FSDPUnit:
    """The parameters of one module, either gathered in full or released."""

    def __init__(self, name: str, flats: Sequence[FlatParameters]):
        self.name = name
        groups = [(flat, group) for flat in flats for group in flat.layout.groups if fsdp_unit(group.names[0]) == name]
        sizes = [group.stop - group.start for _, group in groups]
        self.buffer = ReleasableBuffer(sum(sizes), flats[0].device)
        self.parts = [
            (flat, group, FlatVector([(group.start, group.stop)], full))
            for (flat, group), full in zip(groups, self.buffer.tensor.split(sizes))
        ]
        self.pending: list[Request] | None = None

    def install(self, model: nn.Module) -> None:
        """Make the parameters views of the buffer; autograd does not see later gathers as in-place changes of `.data`."""
        for flat, group, full in self.parts:
            for name in group.names:
                flat.set_parameter(model, name, flat.parameter(name, full).data)
        self.reshard()

    def prefetch(self) -> None:
        """Start the all-gather, unless it has been started. Collective over the reduce axes."""
        if self.pending is not None:
            return
        self.buffer.acquire()
        self.pending = []
        for flat, group, full in self.parts:
            for bucket in group.buckets:
                start, stop = flat.layout.slice(bucket, flat.comm.rank)
                own = flat.values.view(start, stop) if stop > start else full.tensor[:0]
                self.pending.append(flat.comm.iall_gather(own, full.view(*bucket), flat.layout.slices(bucket)))

    def unshard(self) -> None:
        """Wait until the parameters are unsharded. Collective over the reduce axes."""
        self.prefetch()
        for request in self.pending or ():
            request.wait()

    def reshard(self) -> None:
        """Release the full parameters."""
        if self.pending is not None:
            self.unshard()
        self.pending = None
        self.buffer.release()


class ShardedParameters(StageParameters):
    """Gathers the parameters of a stage's model, whose shards lie in `flats`, by hooks on its modules. Every rank of the reduce
    axes must call the model, or a `join_` method in its place, the same number of times."""

    def __init__(self, flats: Sequence[FlatParameters], model: nn.Module):
        names = dict.fromkeys(fsdp_unit(name) for name, _ in model.named_parameters())
        self.units = [FSDPUnit(name, flats) for name in names]  # in the order of forward
        sizes = [unit.buffer.nbytes for unit in self.units]
        self.memory_bytes = max(map(sum, zip(sizes, [*sizes[1:], 0])))  # a unit in use and the next one
        self.backward_unit = len(self.units)
        for number, unit in enumerate(self.units):
            unit.install(model)
            module = model.get_submodule(unit.name)
            module.register_forward_pre_hook(lambda *_, number=number: self._unshard(number, number + 1))
            module.register_forward_hook(lambda _module, _inputs, output, number=number: self._leave(number, output))

    def _unshard(self, number: int, following: int) -> None:
        self.units[number].unshard()
        if 0 <= following < len(self.units):
            self.units[following].prefetch()

    def _leave(self, number: int, output: Tensor | PartLogits | DeferredLogits) -> DeferredLogits | None:
        """Release a unit whose forward has ended. As a hook, it may return what takes the place of the output."""
        if isinstance(output, DeferredLogits):  # the loss has yet to multiply by the head
            return replace(output, leave=partial(self._leave, number))
        self.units[number].reshard()
        for tensor in output.parts if isinstance(output, PartLogits) else (output,):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._begin_unit_backward(number))
        return None

    def _begin_unit_backward(self, number: int) -> None:
        """Gather a unit for its backward; the backward of the units after it has ended."""
        self.backward_unit = number
        for unit in self.units[number + 1 :]:
            unit.reshard()
        self._unshard(number, number - 1)

    def end_backward(self) -> None:
        self.backward_unit = len(self.units)
        for unit in self.units:
            unit.reshard()

    def join_forward(self) -> None:
        """Join the gathers of a forward without a microbatch."""
        for number in range(len(self.units)):
            self._unshard(number, number + 1)
            self.units[number].reshard()

    def begin_backward(self, name: str) -> None:
        """Join the gathers of a backward up to the unit of this parameter, units without trained parameters included."""
        number = [unit.name for unit in self.units].index(fsdp_unit(name))
        for passed in reversed(range(number, self.backward_unit)):
            self._begin_unit_backward(passed)

    def join_backward(self) -> None:
        """Join the gathers of a backward without a microbatch."""
        for number in reversed(range(len(self.units))):
            self._begin_unit_backward(number)
        self.end_backward()


def all_gather_shards(flat: FlatParameters, vector: FlatVector) -> None:
    """Gather the shards of all ranks that share out the parameters into every rank's `vector`. Collective."""
    layout, comm, pending = flat.layout, flat.comm, list[Request]()
    first = vector.intervals[0][0]
    for bucket in [bucket for bucket in layout.buckets if bucket[0] >= first]:
        own = vector.view(*layout.slice(bucket, comm.rank))
        pending.append(comm.iall_gather(own, vector.view(*bucket), layout.slices(bucket)))
        if len(pending) > GATHERS_IN_FLIGHT:
            pending.pop(0).wait()
    for request in pending:
        request.wait()
