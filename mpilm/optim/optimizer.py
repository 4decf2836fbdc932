"""The optimizers of train.optimizer, each a pair of parameter optimizers that divide the parameters between them."""

from collections.abc import Callable, Mapping

from torch import Tensor

from mpilm.config.schema import TrainConfig
from mpilm.optim.base import ParameterOptimizer
from mpilm.optim.elementwise import SGD, AdamW
from mpilm.optim.matrix import Adafactor, Muon
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.layout import ParamLayout, Shape
from mpilm.parallel.reduce.diloco import OUTER_MOMENTUM, DiLoCo

OPTIMIZERS: Mapping[str, tuple[type[ParameterOptimizer], type[ParameterOptimizer]]] = {
    "adamw": (AdamW, AdamW),
    "sgd": (SGD, SGD),
    "adafactor": (Adafactor, Adafactor),
    "muon": (Muon, AdamW),
}
"""Name -> the optimizer of unsharded parameters, and that of all others."""


def needs_full_parameter(optimizer: str) -> Callable[[str, Shape], bool]:
    """Return the predicate of the parameters that are updated as a whole: with Muon, the matrices of blocks."""
    if optimizer == "muon":
        return lambda name, shape: name.startswith("blocks.") and len(shape) == 2
    return lambda name, shape: optimizer == "adafactor"


def moment_shapes(optimizer: str, layouts: Mapping[str, ParamLayout], local_sgd: bool = False) -> dict[str, dict[str, Shape]]:
    """Return the shapes of all moments of these parameters, by name and parameter.

    `local_sgd`: replicas synchronize through an outer optimizer (parallel/reduce/diloco.py).
    """
    shapes: dict[str, dict[str, Shape]] = {}
    if local_sgd:
        shapes[OUTER_MOMENTUM] = {name: layout.shape for name, layout in layouts.items()}
    unsharded, divisible = OPTIMIZERS[optimizer]
    for name, layout in layouts.items():
        for state, shape in (unsharded if layout.unsharded else divisible).state_shapes(layout.shape).items():
            shapes.setdefault(state, {})[name] = shape
    return shapes


class Optimizer:
    """Updates the stages of this rank, and holds the outer optimizer of local SGD if replicas synchronize only now and then."""

    def __init__(self, flats: Mapping[int, FlatParameters], train: TrainConfig, diloco: DiLoCo | None = None):
        self.diloco = diloco
        self.optimizers = [optimizer(flats, train) for optimizer in dict.fromkeys(OPTIMIZERS[train.optimizer])]

    def set_step(self, step: int) -> None:
        """Set the number of updates that the moments have seen."""
        for optimizer in self.optimizers:
            optimizer.set_step(step)

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        """Update the parameters that this rank owns; gradients are by stage."""
        if self.diloco is not None:
            self.diloco.begin_step()
        for optimizer in self.optimizers:
            optimizer.step(gradients, lr)

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        """Return the flat moments of the parameter slices that this rank updates, by name; all names on every rank."""
        slices = {state: items for optimizer in self.optimizers for state, items in optimizer.state_slices().items()}
        return slices if self.diloco is None else {OUTER_MOMENTUM: self.diloco.owned_slices(), **slices}

    @property
    def memory_bytes(self) -> int:
        """Memory of the moments."""
        moments = (x for optimizer in self.optimizers for items in optimizer.state_slices().values() for x in items.values())
        return sum(4 * x.numel() for x in moments) + (self.diloco.memory_bytes if self.diloco is not None else 0)
