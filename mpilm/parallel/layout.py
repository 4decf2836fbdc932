"""The one table that initialisation, gradient sums, clipping, checkpoints and memory reports read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Layout:
    """What there is to know of one parameter.

    `sum_over`: mesh axes over which its gradient is partial. `tied_to`: the parameter whose memory this one uses; each
    of the two has a gradient of its own. `decays`: whether weight decay applies.
    """

    name: str
    shape: tuple[int, ...]
    sum_over: tuple[str, ...]
    decays: bool
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def resolve(shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> dict[str, Layout]:
    """The layout of each named parameter of a model; `tied` maps a parameter to the one whose memory it uses.

    Raises ValueError for a tie between parameters that do not exist or differ in shape.
    """
    for name, owner in tied.items():
        if shapes.get(name) is None or shapes.get(name) != shapes.get(owner):
            raise ValueError(f"{name} {shapes.get(name)} cannot be tied to {owner} {shapes.get(owner)}")
    return {
        name: Layout(name, tuple(shape), ("data",), decays=len(shape) >= 2, tied_to=tied.get(name))
        for name, shape in shapes.items()
    }


def owned(layouts: Mapping[str, Layout]) -> list[Layout]:
    """The parameters that have memory of their own: what is optimized, saved and counted."""
    return [layout for layout in layouts.values() if layout.tied_to is None]
