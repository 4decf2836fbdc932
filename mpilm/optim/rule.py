"""What an optimizer's rule is: an update of some of the parameters, and the moments that it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from mpilm.config import Train
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Piece

Shape = tuple[int, ...]


class Rule(ABC):
    """Updates what `flats`, the stages of this rank by number, say that this rank updates, as far as it is the rule's."""

    @classmethod
    @abstractmethod
    def moments_of(cls, shape: Shape) -> Mapping[str, Shape]:
        """The shapes of the moments, by kind, of a parameter of this shape."""

    @abstractmethod
    def __init__(self, flats: Mapping[int, FlatParameters], train: Train): ...

    @abstractmethod
    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""

    @abstractmethod
    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        """One update; gradients are by stage."""

    @abstractmethod
    def pieces(self) -> dict[str, dict[Piece, Tensor]]:
        """The moments of what this rank updates, flat, by kind; all kinds on every rank."""
