"""The layout table: the facts about each parameter that initialisation, reduction, clipping and checkpoints read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from mpilm.mesh.shape import MeshShape
from mpilm.parallel.plan import Cut

Shape = tuple[int, ...]
REDUCE_AXES = ("data", "context")  # axes whose ranks see different tokens, so that their gradients are partial sums


@dataclass(frozen=True)
class ParamLayout:
    """Layout of one parameter, the same on all ranks."""

    name: str
    shape: Shape  # global
    stage: int = 0
    cut: Cut | None = None  # None: replicated within its stage
    parts: int = 1  # ranks on the axis of the cut
    tied_to: str | None = None  # the parameter whose value this one always has; each of the two has its own gradient
    tied_copies: tuple[str, ...] = ()  # the parameters tied to this one
    unsharded: bool = False  # its optimizer needs the full parameter, so ZeRO assigns it to one rank undivided
    frozen: bool = False  # not trained: it has no gradient

    @property
    def local_shape(self) -> Shape:
        """Shape on one rank of its stage, before ZeRO."""
        if self.cut is None or self.parts == 1:
            return self.shape
        return tuple(size // self.parts if dim == self.cut.dim else size for dim, size in enumerate(self.shape))

    @property
    def numel(self) -> int:
        """Elements on one rank of its stage, before ZeRO."""
        return prod(self.local_shape)

    @property
    def decays(self) -> bool:
        """True if weight decay applies: to matrices only."""
        return len(self.shape) >= 2

    @property
    def is_tied(self) -> bool:
        return self.tied_to is not None or bool(self.tied_copies)

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """The mesh axes whose ranks hold the same values."""
        return tuple(axis for axis in (*REDUCE_AXES, "tensor") if self.cut is None or axis != self.cut.axis)


Layouts = Mapping[str, ParamLayout]  # by the parameter's name


def resolve_layouts(
    shapes: Mapping[str, Shape],
    tied: Mapping[str, str],
    stage_of: Callable[[str], int] = lambda name: 0,
    cut_of: Callable[[str], Cut | None] = lambda name: None,
    mesh: MeshShape = MeshShape(),  # noqa: B008 - frozen
    is_unsharded: Callable[[str, Shape], bool] = lambda name, shape: False,
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> dict[str, ParamLayout]:
    """Return the layout of each parameter, in the order in which forward uses them. `tied`: parameter -> the one whose value it
    has. `stage_of`, `cut_of`: the plan (parallel/plan.py). Raises ValueError for ties that do not exist or differ in shape."""
    for name, owner in tied.items():
        if shapes.get(name) is None or shapes.get(name) != shapes.get(owner):
            raise ValueError(f"{name} {shapes.get(name)} cannot be tied to {owner} {shapes.get(owner)}")
    layouts = {}
    for name, shape in shapes.items():
        cut, unsharded, frozen = cut_of(name), is_unsharded(name, shape), is_frozen(name)
        parts = 1 if cut is None else getattr(mesh, cut.axis)
        copies = tuple(copy for copy, owner in tied.items() if owner == name)
        layouts[name] = ParamLayout(name, shape, stage_of(name), cut, parts, tied.get(name), copies, unsharded, frozen)
    return layouts


def select_owned(layouts: Layouts) -> list[ParamLayout]:
    """Return the parameters that are optimized, saved and counted: those not tied to another."""
    return [layout for layout in layouts.values() if layout.tied_to is None]


def select_stage(layouts: Layouts, stage: int) -> dict[str, ParamLayout]:
    return {name: layout for name, layout in layouts.items() if layout.stage == stage}


def select_trained(layouts: Layouts) -> dict[str, ParamLayout]:
    """Return the parameters that have gradients; the others are frozen."""
    return {name: layout for name, layout in layouts.items() if not layout.frozen}
