"""What a model must know of the rows that it reads, beside their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpilm.model.cache import Cache

Rotation = tuple[Tensor, Tensor]

EMPTY = -1  # what is called a document where a row holds nothing more


@dataclass(frozen=True)
class Rows:
    """`positions`: (T,) for all rows, or (B, T). `keys`: what dropout is keyed by, one integer a row; None: no dropout.
    `documents`: (B, T), numbers; attention stays among tokens of the same one; EMPTY: no token is there; None: each row is one
    document. `share`: the part of the step's target tokens that these rows have, by which a loss inside the model is weighed.
    `rotation`: of rotary positions, once a model that has them has worked it out. `cache`: of what the row began with, unless
    all is read again."""

    positions: Tensor
    keys: list[int] | None = None
    documents: Tensor | None = None
    share: float = 0.0
    rotation: Rotation | None = None
    cache: Cache | None = None
