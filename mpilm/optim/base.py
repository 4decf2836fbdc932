"""The interface of an optimizer for some of the parameters."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from mpilm.config.schema import TrainConfig
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.layout import Shape


class ParameterOptimizer(ABC):
    """Updates the parameters of its kind among those that this rank owns in `flats` (by stage)."""

    @classmethod
    @abstractmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        """Return the shapes of the moments, by name, of a parameter of this shape."""

    @abstractmethod
    def __init__(self, flats: Mapping[int, FlatParameters], train: TrainConfig): ...

    @abstractmethod
    def set_step(self, step: int) -> None:
        """Set the number of updates that the moments have seen."""

    @abstractmethod
    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        """Update once; gradients are by stage."""

    @abstractmethod
    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        """Return the flat moments of the parameter slices that this rank updates, by name; all names on every rank."""
