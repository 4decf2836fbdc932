"""Digests of the state in memory. Only updates change it: other changes are a sign of failing memory."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ParamSlice, intersect_intervals

MODULUS = 2**32  # of sums of bits
HASH_MODULUS = 2**63
CAUSE = "a processor or its memory may be failing"
NamedTensors = list[tuple[str, Tensor]]


def sum_bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor's 32-bit words modulo 2**32. It changes with each single bit, and is as fast as memory."""
    return [x.view(torch.int32).sum(dtype=torch.int32) for x in tensors]


def hash_bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the same sum of each tensor and, above it, 31 bits of the sum of w (2 w + 1) over its words w. Small errors in a
    few words, which may cancel out in the first sum, do not in the second. Sums of these numbers are modulo HASH_MODULUS."""
    hashes = []
    for x in tensors:
        words = x.contiguous().view(torch.int32)
        mixed, plain = ((words * (2 * words + 1)).sum(dtype=torch.int32), words.sum(dtype=torch.int32))
        hashes.append((mixed.long() % (HASH_MODULUS // MODULUS) * MODULUS) + plain.long() % MODULUS)
    return hashes


def name_bit(difference: int) -> str:
    """Return which bit differs, given the difference of two sums of bits, if it can be a single one."""
    size = min(difference % MODULUS, -difference % MODULUS)
    return f"bit {size.bit_length() - 1} of an element" if size and size & (size - 1) == 0 else ""


def read_sums(sums: list[Tensor]) -> list[int]:
    """Return the values of sums, which may be on a device."""
    return torch.stack(sums).tolist() if sums else []


class StateDigests:
    """Digests of the weights that this rank holds and of the `moments` that it updates, taken right after they were written."""

    def __init__(self, flats: Iterable[FlatParameters], moments: Mapping[str, Mapping[ParamSlice, Tensor]]):
        self.owned, self.received = NamedTensors(), NamedTensors()  # weights updated here, and those that other ranks update
        for flat in flats:
            edges = [0, *chain.from_iterable(flat.owned), flat.layout.numel]
            others = [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
            received = flat.layout.param_slices(intersect_intervals(others, flat.values.intervals))
            self.owned += [(item.name, x) for item, x in flat.owned_slices(flat.values).items()]
            self.received += [(item.name, flat.values.view(at, at + item.numel)) for item, at in received.items()]
        self.moments = [(f"{item.name} ({kind})", x) for kind, slices in moments.items() for item, x in slices.items()]
        self._parts = [*self.owned, *self.received, *self.moments]
        self.names = [name for name, _ in self._parts]
        self.weight_names = self.names[: len(self.owned) + len(self.received)]
        self._recorded = _sums(self._parts)

    @property
    def recorded(self) -> list[int]:
        """The digests after the last update, one for each of `names`."""
        return read_sums(self._recorded)

    def measure(self) -> list[int]:
        """Return the digests of what memory holds now, one for each of `names`."""
        return read_sums(_sums(self._parts))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record digests of what this rank has updated, before other ranks receive it, and then of what it has received."""
        owned, moments = _sums(self.owned), _sums(self.moments)
        yield
        self._recorded = [*owned, *_sums(self.received), *moments]


def _sums(items: NamedTensors) -> list[Tensor]:
    return sum_bits(x for _, x in items)
