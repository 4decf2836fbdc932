"""Digests of the state in memory. Only updates change it: other changes are a sign of failing memory."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ParamSlice, intersect_intervals

NamedWords = list[tuple[str, Tensor]]  # parameter, a view of its float32 values as integers


def bit_words(slices: Mapping[ParamSlice, Tensor]) -> NamedWords:
    """Return views of float32 slices as 64-bit integers, and of the last element of an odd number as one of 32 bits."""
    found: NamedWords = []
    for item, x in slices.items():
        even = x.numel() - x.numel() % 2
        found += [(item.name, words) for words in (x[:even].view(torch.int64), x[even:].view(torch.int32)) if words.numel()]
    return found


def sum_words(parts: NamedWords) -> list[Tensor]:
    """Return the sum of the integers of each part modulo 2**64. It changes with every single bit."""
    return [words.sum(dtype=torch.int64) for _, words in parts]


def read_sums(sums: Sequence[Tensor]) -> list[int]:
    """Return the values of sums, which may be on a device."""
    return torch.stack(list(sums)).tolist() if sums else []


class StateDigests:
    """The digests of the weights that this rank holds and of the `moments` that it updates, by kind. Each is taken right after
    they were written."""

    def __init__(self, flats: Iterable[FlatParameters], moments: Mapping[str, Mapping[ParamSlice, Tensor]]):
        self.owned, self.received = NamedWords(), NamedWords()  # weights updated here, and those that other ranks update
        for flat in flats:
            edges = [0, *chain.from_iterable(flat.owned), flat.layout.numel]
            others = [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
            received = flat.layout.param_slices(intersect_intervals(others, flat.values.intervals))
            self.owned += bit_words(flat.owned_slices(flat.values))
            self.received += bit_words({item: flat.values.view(at, at + item.numel) for item, at in received.items()})
        self.moments = [(f"{name} ({kind})", x) for kind, slices in moments.items() for name, x in bit_words(slices)]
        self.weight_names = [name for name, _ in (*self.owned, *self.received)]
        self.names = [*self.weight_names, *(name for name, _ in self.moments)]
        self._recorded = sum_words([*self.owned, *self.received, *self.moments])

    @property
    def recorded(self) -> list[int]:
        """The digests after the last update, one for each of `names`."""
        return read_sums(self._recorded)

    def measure(self) -> list[int]:
        """Return the digests of what memory holds now, one for each of `names`."""
        return read_sums(sum_words([*self.owned, *self.received, *self.moments]))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record digests of what this rank has updated, before other ranks receive it, and then of what it has received."""
        owned, moments = sum_words(self.owned), sum_words(self.moments)
        yield
        self._recorded = [*owned, *sum_words(self.received), *moments]
