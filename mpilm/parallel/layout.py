"""The one table that initialisation, gradient sums, clipping, checkpoints and memory reports read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Layout:
    """What there is to know of one parameter.

    `sum_over`: mesh axes over which its gradient is partial. `tied_to`: the parameter whose value this one always has; each
    of the two has a gradient of its own; `uses`: those tied to this one. `decays`: whether weight decay applies. `stage`: the
    part of the pipeline that has it. `whole`: its optimizer wants all of it at once, so that ZeRO gives it to one rank uncut.
    `frozen`: it is not trained, and has no gradient.
    """

    name: str
    shape: tuple[int, ...]
    sum_over: tuple[str, ...]
    decays: bool
    tied_to: str | None = None
    stage: int = 0
    uses: tuple[str, ...] = ()
    whole: bool = False
    frozen: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


def resolve(
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    stage_of: Callable[[str], int] = lambda name: 0,
    whole: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: False,
    frozen: Callable[[str], bool] = lambda name: False,
) -> dict[str, Layout]:
    """The layout of each named parameter of a model, in the order in which forward uses them.

    `tied` maps a parameter to the one whose value it has; `whole` says of a name and a shape whether ZeRO leaves it uncut,
    `frozen` of a name whether it is not trained. Raises ValueError for a tie between parameters that do not exist or differ in
    shape.
    """
    for name, owner in tied.items():
        if shapes.get(name) is None or shapes.get(name) != shapes.get(owner):
            raise ValueError(f"{name} {shapes.get(name)} cannot be tied to {owner} {shapes.get(owner)}")
    uses = {owner: tuple(name for name in tied if tied[name] == owner) for owner in tied.values()}
    return {
        name: Layout(
            name, tuple(shape), ("data",), len(shape) >= 2, tied.get(name), stage_of(name), uses.get(name, ()),
            whole(name, tuple(shape)), frozen(name),
        )
        for name, shape in shapes.items()
    }  # fmt: skip


def owned(layouts: Mapping[str, Layout]) -> list[Layout]:
    """The parameters that are optimized, saved and counted: those whose value is their own."""
    return [layout for layout in layouts.values() if layout.tied_to is None]


def of_stage(layouts: Mapping[str, Layout], stage: int) -> dict[str, Layout]:
    """The parameters of one pipeline stage."""
    return {name: layout for name, layout in layouts.items() if layout.stage == stage}


def trained(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """The parameters that have gradients."""
    return {name: layout for name, layout in layouts.items() if not layout.frozen}


def frozen(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Those that stay as they are."""
    return {name: layout for name, layout in layouts.items() if layout.frozen}
