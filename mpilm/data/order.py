"""The order of samples: a keyed permutation of any size with no index to build or store, so a corpus starts at once.

A Feistel network is a bijection of the numbers of 2 w bits whatever its round function is. Numbers that land outside
[0, n) are sent through it again until they land inside ("cycle walking"), which leaves a bijection of [0, n).
"""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Bits = NDArray[np.uint64]
ROUNDS = 8
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def _mix_bits(x: Bits) -> Bits:
    """Return a bijection of 64-bit numbers in which every input bit moves every output bit (the end of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_key(*parts: int) -> int:
    """Return one 64-bit key for several whole numbers; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix_bits(key + GOLDEN_RATIO + np.uint64(part % 2**64))
    return int(key[0])


VALIDATION_KEY = mix_key(0x6576616C)


def permute(index: Indices, n: int, key: int) -> Indices:
    """Return where each index of [0, n) goes in the permutation of that key; int64, the shape of `index`."""
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    keys = _mix_bits(np.uint64(key % 2**64) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN_RATIO)
    out = _feistel(np.asarray(index).astype(np.uint64).ravel(), half_bits, keys)
    while (outside := np.flatnonzero(out >= np.uint64(n))).size:
        out[outside] = _feistel(out[outside], half_bits, keys)
    return out.astype(np.int64).reshape(np.shape(index))


def _feistel(x: Bits, half_bits: int, keys: Bits) -> Bits:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix_bits(right + key) & mask)
    return (left << shift) | right


def pick_samples(positions: Indices, seed: int | None, n_samples: int) -> Indices:
    """Return the sample at each position: of a run, reshuffled every epoch, or of the validation split (None), always alike."""
    if seed is None:
        return permute(positions, n_samples, VALIDATION_KEY)
    return permute_rounds(positions, n_samples, seed)[1]


def permute_rounds(positions: Indices, n: int, *key: int) -> tuple[Indices, Indices]:
    """Return the round of n positions in which each lies, and where it goes in the permutation of that round; both int64."""
    rounds, places = np.divmod(np.asarray(positions, dtype=np.int64), n)
    for each in np.unique(rounds):
        places[rounds == each] = permute(places[rounds == each], n, mix_key(*key, int(each)))
    return rounds, places
