"""Parameters that are whole only while they are used (ZeRO-3; Rajbhandari et al., arXiv 1910.02054, section 5.3).

Each unit of the model (a block, the embedding, ...) is gathered before its forward and before its backward, while the one
before it computes, and let go afterwards. What autograd has saved of a unit's parameters are views of the memory that is given
back, and they see the values that come anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm, Request
from mpilm.parallel.flat import FlatParameters, set_parameter
from mpilm.parallel.plan import unit_of

IN_FLIGHT = 2  # buckets under way at once


class Fleeting:
    """A float32 tensor whose memory is given back between uses, and comes again at the same address with other values.

    On a CPU by handing the pages back to the kernel: what malloc is given back it mostly keeps.
    """

    def __init__(self, numel: int, device: torch.device):
        self.bytes = 4 * numel
        self._pages = None
        if device.type == "cpu":
            self._pages = mmap(-1, self.bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
            self.tensor = torch.frombuffer(self._pages, dtype=torch.float32)
        else:
            self.tensor = torch.empty(numel, device=device)

    def take(self) -> None:
        if self._pages is None:
            self.tensor.untyped_storage().resize_(self.bytes)

    def give_back(self) -> None:
        if self._pages is None:
            self.tensor.untyped_storage().resize_(0)
        else:
            self._pages.madvise(MADV_DONTNEED)


class Unit:
    """The parameters of one module, whole or not there; `whole` holds their parts of the flat vectors, one after the other."""

    def __init__(self, name: str, flats: Sequence[FlatParameters], comm: Comm):
        self.name, self.comm = name, comm
        groups = [(flat, group) for flat in flats for group in flat.layout.groups if unit_of(group.names[0]) == name]
        *places, numel = accumulate((group.stop - group.start for _, group in groups), initial=0)
        self.parts = [(flat, group, at - group.start) for (flat, group), at in zip(groups, places)]
        """Groups of flat vectors, and what is added to a place there to make it one in `whole`."""
        self.memory = Fleeting(numel, flats[0].device)
        self.whole = self.memory.tensor
        self.coming: list[Request] | None = None

    def install(self, model: nn.Module) -> None:
        """Make the parameters views of `whole`, with versions of their own: gathering anew is no change of a value."""
        for flat, group, shift in self.parts:
            for name in group.names:
                at, layout = flat.layout.slots[name]
                part = self.whole[at + shift : at + shift + layout.numel].view(layout.shape)
                set_parameter(model, name, part.data, layout)
        self.release()

    def fetch(self) -> None:
        """Start to gather, unless that has been done. Collective over the data axis."""
        if self.coming is not None:
            return
        self.memory.take()
        self.coming = []
        for flat, group, shift in self.parts:
            for bucket in flat.layout.buckets_of(group):
                start, stop = flat.layout.slice(bucket, self.comm.rank)
                mine = flat.values.view(start, stop) if stop > start else self.whole[:0]
                out = self.whole[bucket[0] + shift : bucket[1] + shift]
                self.coming.append(self.comm.iall_gather(mine, out, flat.layout.slices(bucket)))

    def wait(self) -> None:
        """Returns when the parameters are whole."""
        self.fetch()
        for request in self.coming or ():
            request.wait()

    def release(self) -> None:
        if self.coming is not None:
            self.wait()
        self.coming = None
        self.memory.give_back()


class ResidentParameters:
    """Parameters that are whole on every rank that uses them: there is nothing to do."""

    @property
    def held_bytes(self) -> int:
        """Memory of parameters that come and go."""
        return 0

    def end_backward(self) -> None: ...

    def join_forward(self) -> None: ...

    def begin_backward(self, name: str) -> None: ...

    def join_backward(self) -> None: ...


class GatheredParameters(ResidentParameters):
    """Gathers the parameters of a stage's model, which lie in `flats`, when its modules are called, and in backward.

    Every rank of the data axis must call the model, or `join` in its place, the same number of times.
    """

    def __init__(self, flats: Sequence[FlatParameters], model: nn.Module, comm: Comm):
        order = dict.fromkeys(unit_of(name) for name, _ in model.named_parameters())
        self.units = [Unit(name, flats, comm) for name in order]  # in the order of forward
        self.backward_at = len(self.units)
        for number, unit in enumerate(self.units):
            unit.install(model)
            module = model.get_submodule(unit.name)
            module.register_forward_pre_hook(lambda *_, number=number: self._use(number, number + 1))
            module.register_forward_hook(lambda _module, _inputs, output, number=number: self._leave(number, output))

    @property
    def held_bytes(self) -> int:
        """Most that is whole at one time: a unit in use and the next one."""
        sizes = [unit.memory.bytes for unit in self.units]
        return max(sum(pair) for pair in zip(sizes, [*sizes[1:], 0]))

    def _use(self, number: int, following: int) -> None:
        self.units[number].wait()
        if 0 <= following < len(self.units):
            self.units[following].fetch()

    def _leave(self, number: int, output: Tensor) -> None:
        self.units[number].release()
        if output.requires_grad:
            output.register_hook(lambda _: self._begin_backward(number))

    def _begin_backward(self, number: int) -> None:
        """Backward of a unit begins, so that of the unit after it has ended."""
        self.backward_at = number
        for unit in self.units[number + 1 :]:
            unit.release()
        self._use(number, number - 1)

    def end_backward(self) -> None:
        self.backward_at = len(self.units)
        for unit in self.units:
            unit.release()

    def join_forward(self) -> None:
        """Take part in a forward without a microbatch of one's own."""
        for number in range(len(self.units)):
            self._use(number, number + 1)
            self.units[number].release()

    def begin_backward(self, name: str) -> None:
        """Take part in backward as far as the unit that has this parameter: also in that of units where nothing is trained."""
        number = [unit.name for unit in self.units].index(unit_of(name))
        for passed in reversed(range(number, self.backward_at)):
            self._begin_backward(passed)

    def join_backward(self) -> None:
        """Take part in a backward without a microbatch of one's own."""
        for number in reversed(range(len(self.units))):
            self._begin_backward(number)
        self.end_backward()


def gather_shards(flat: FlatParameters, comm: Comm) -> None:
    """Bring the shards that the data ranks have updated together in everybody's values (ZeRO-1 and 2). Collective."""
    coming: list[Request] = []
    first = flat.values.intervals[0][0]
    for bucket in [bucket for bucket in flat.layout.buckets if bucket[0] >= first]:
        mine = flat.values.view(*flat.layout.slice(bucket, comm.rank))
        coming.append(comm.iall_gather(mine, flat.values.view(*bucket), flat.layout.slices(bucket)))
        if len(coming) > IN_FLIGHT:
            coming.pop(0).wait()
    for request in coming:
        request.wait()
