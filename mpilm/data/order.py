"""Which sample comes when: a keyed permutation of any size with no index to build or store, so a corpus starts at once.

A Feistel network is a bijection of the numbers of 2 w bits whatever its round function is. Numbers that land outside
[0, n) are sent through it again until they land inside ("cycle walking"), which leaves a bijection of [0, n).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8


def mix(x: Words) -> Words:
    """A bijection of 64-bit words in which every input bit moves every output bit (the end of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several whole numbers; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.uint64(part % 2**64))
    return int(key[0])


def permute(index: Indices, n: int, key: int) -> Indices:
    """Where each index of [0, n) goes in the permutation of that key; int64, the shape of `index`."""
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    keys = mix(np.uint64(key % 2**64) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    out = _feistel(np.asarray(index).astype(np.uint64).ravel(), half_bits, keys)
    while (outside := np.flatnonzero(out >= np.uint64(n))).size:
        out[outside] = _feistel(out[outside], half_bits, keys)
    return out.astype(np.int64).reshape(np.shape(index))


def _feistel(x: Words, half_bits: int, keys: Words) -> Words:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def sample_at(position: Indices, seed: int, n_samples: int) -> Indices:
    """The sample read at each position of the endless stream of a run: each sample once an epoch, anew shuffled."""
    epoch, place = np.divmod(np.asarray(position, dtype=np.int64), n_samples)
    samples = np.empty_like(place)
    for e in np.unique(epoch):
        samples[epoch == e] = permute(place[epoch == e], n_samples, key_of(seed, int(e)))
    return samples


def sample_indices(seed: int, step: int, global_batch: int, n_samples: int) -> Indices:
    """The samples of one step's global batch, in slot order; (global_batch,) int64."""
    return sample_at(step * global_batch + np.arange(global_batch, dtype=np.int64), seed, n_samples)
