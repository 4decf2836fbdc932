"""Initial values: a function of (seed, name, shape) alone, so that any part of a model can be made anywhere.

numpy's Philox and its table-driven normal distribution give the same numbers on every processor; torch's own
generators differ between vector widths.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def hash_key(*parts: object) -> int:
    """Return a 64-bit key of the parts, the same in every process (Python's hash() is not)."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def initial_value(seed: int, name: str, shape: tuple[int, ...], std: float | None) -> Tensor:
    """Return float32 values for the parameter `name`: normal with deviation `std`, or ones if `std` is None."""
    if not std:
        return torch.full(shape, 1.0 if std is None else 0.0)
    generator = np.random.Generator(np.random.Philox(key=hash_key("init", seed, name)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(std)
