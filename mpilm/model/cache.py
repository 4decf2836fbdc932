"""Keys and values of what has been read already, so that each new token costs the work of one."""

from __future__ import annotations

from torch import Tensor


class Cache:
    """Of one row of at most `capacity` tokens: for each place in the model its keys and values."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self._length: dict[str, int] = {}

    def extend(self, place: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens, 2 x (1, G, T, K), and return all so far."""
        start = self._length.get(place, 0)
        stop = start + k.shape[2]
        if place not in self._held:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._held[place] = k.new_empty(shape), v.new_empty(shape)
        self._length[place] = stop
        for held, new in zip(self._held[place], (k, v)):
            held[:, :, start:stop] = new
        keys, values = self._held[place]
        return keys[:, :, :stop], values[:, :, :stop]
