"""The optimizers there are, each made of rules that share the parameters out among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mpilm.config import Train
from mpilm.optim.elementwise import SGD, AdamW
from mpilm.optim.outer import OUTER, Outer
from mpilm.optim.rule import Rule, Shape
from mpilm.optim.whole import Adafactor, Muon
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import Layout
from mpilm.parallel.shard import Piece

RULES: Mapping[str, tuple[type[Rule], type[Rule]]] = {
    "adamw": (AdamW, AdamW),
    "sgd": (SGD, SGD),
    "adafactor": (Adafactor, Adafactor),
    "muon": (Muon, AdamW),
}
"""Of each optimizer, the rule of parameters that stay whole, and that of the others."""


def stays_whole(optimizer: str) -> Callable[[str, Shape], bool]:
    """Whether a parameter of this name and shape is updated as a whole: with Muon, the matrices of blocks."""
    if optimizer == "muon":
        return lambda name, shape: name.startswith("blocks.") and len(shape) == 2
    return lambda name, shape: optimizer == "adafactor"


def moment_shapes(optimizer: str, layouts: Mapping[str, Layout], outer: bool = False) -> dict[str, dict[str, Shape]]:
    """The shapes of all moments of these parameters, by kind and name; `outer`: replicas meet now and then (optim/outer.py)."""
    found: dict[str, dict[str, Shape]] = {}
    if outer:
        found[OUTER] = {name: layout.shape for name, layout in layouts.items()}
    whole, cut = RULES[optimizer]
    for name, layout in layouts.items():
        for kind, shape in (whole if layout.whole else cut).moments_of(layout.shape).items():
            found.setdefault(kind, {})[name] = shape
    return found


class Optimizer:
    """The rules of `train.optimizer` at work on the stages of this rank, and what brings replicas together that meet only now
    and then."""

    def __init__(self, flats: Mapping[int, FlatParameters], train: Train, outer: Outer | None = None):
        self.outer = outer
        self.rules = [rule(flats, train) for rule in dict.fromkeys(RULES[train.optimizer])]

    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""
        for rule in self.rules:
            rule.set_step(step)

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        """One update of what this rank updates; gradients are by stage."""
        if self.outer is not None:
            self.outer.begin()
        for rule in self.rules:
            rule.step(gradients, lr)

    def pieces(self) -> dict[str, dict[Piece, Tensor]]:
        """The moments of what this rank updates, flat, by kind; all kinds on every rank."""
        found = {kind: pieces for rule in self.rules for kind, pieces in rule.pieces().items()}
        return found if self.outer is None else {OUTER: self.outer.pieces(), **found}

    @property
    def held_bytes(self) -> int:
        """Memory of the moments."""
        of_rules = sum(4 * x.numel() for rule in self.rules for pieces in rule.pieces().values() for x in pieces.values())
        return of_rules + (self.outer.held_bytes if self.outer is not None else 0)
