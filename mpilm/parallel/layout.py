"""The layout table: the facts about each parameter that initialisation, reduction, clipping and checkpoints read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

from mpilm.parallel.plan import Cut, part_name

Shape = tuple[int, ...]
REDUCE_AXES = ("data", "expert", "context")  # axes whose ranks see different tokens, so that their gradients are partial sums
EXPERT_REDUCE_AXES = ("data", "context")  # of experts, which the expert axis divides
FlatKey = tuple[int, bool]  # a stage's flat vector of parameters: of divided experts, or of all else


@dataclass(frozen=True)
class ParamPart:
    """A part of a parameter that the tensor axis divides (parallel/tensor.py)."""

    source: str  # name of the parameter
    shape: Shape  # of the whole parameter
    cut: Cut
    number: int  # of the part, from 0
    count: int  # number of parts

    @property
    def runs(self) -> tuple[int, int, int]:
        """The place of the part in the flattened parameter, as runs of equal length at equal distances: the first element, the
        length of a run, and the distance from the beginning of one run to that of the next."""
        inner, size = prod(self.shape[self.cut.dim + 1 :]), self.shape[self.cut.dim]
        rows = self.cut.ranges(size, self.count)[self.number]
        return rows.start * inner, len(rows) * inner, size // self.cut.fused * inner


@dataclass(frozen=True)
class ParamLayout:
    """Layout of one parameter, or of one part of it; the same on all ranks."""

    name: str  # of the parameter, or of the part (plan.part_name)
    shape: Shape  # of the parameter, or of the part; before ZeRO
    stage: int = 0
    part: ParamPart | None = None  # None: the whole parameter, which is replicated within its stage
    tied_to: str | None = None  # the parameter whose value this one always has; each of the two has its own gradient
    tied_copies: tuple[str, ...] = ()  # the parameters tied to this one
    unsharded: bool = False  # its optimizer needs the full parameter, so ZeRO assigns it to one rank undivided
    frozen: bool = False  # not trained: it has no gradient
    expert: int | None = None  # number of the expert that it belongs to, if the expert axis divides them

    @property
    def numel(self) -> int:
        """Elements on one rank of its stage, before ZeRO."""
        return prod(self.shape)

    @property
    def source(self) -> str:
        """Name of the parameter in the model that is not divided."""
        return self.name if self.part is None else self.part.source

    @property
    def global_shape(self) -> Shape:
        return self.shape if self.part is None else self.part.shape

    def piece_of(self, shape: Shape) -> tuple[str, Shape]:
        """Return the name and the shape of what belongs to this layout of a tensor of the optimizer, given its global shape: a
        part if it is divided as the parameter is, else all of it."""
        return (self.name, self.shape) if shape == self.global_shape else (self.source, shape)

    @property
    def decays(self) -> bool:
        """True if weight decay applies: to matrices only."""
        return len(self.shape) >= 2

    @property
    def is_tied(self) -> bool:
        return self.tied_to is not None or bool(self.tied_copies)

    @property
    def flat_key(self) -> FlatKey:
        """The flat vector that it lies in."""
        return self.stage, self.expert is not None

    @property
    def reduce_axes(self) -> tuple[str, ...]:
        """The mesh axes over which its gradient is summed."""
        return REDUCE_AXES if self.expert is None else EXPERT_REDUCE_AXES

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """The mesh axes whose ranks hold the same values."""
        return self.reduce_axes if self.part is not None else (*self.reduce_axes, "tensor")


Layouts = Mapping[str, ParamLayout]  # by the name of the parameter or part


def resolve_layouts(
    shapes: Mapping[str, Shape],
    tied: Mapping[str, str],
    stage_of: Callable[[str], int] = lambda name: 0,
    cut_of: Callable[[str], Cut | None] = lambda name: None,
    parts: int = 1,
    is_unsharded: Callable[[str, Shape], bool] = lambda name, shape: False,
    is_frozen: Callable[[str], bool] = lambda name: False,
    expert_of: Callable[[str], int | None] = lambda name: None,
) -> dict[str, ParamLayout]:
    """Return the layout of each parameter, in the order in which forward uses them. A cut one has a layout for each of `parts`.
    `tied`: parameter -> the one whose value it has. `stage_of`, `cut_of`, `expert_of`: the plan (parallel/plan.py). Raises
    ValueError for ties that do not exist or differ in shape."""
    for name, owner in tied.items():
        if shapes.get(name) is None or shapes.get(name) != shapes.get(owner):
            raise ValueError(f"{name} {shapes.get(name)} cannot be tied to {owner} {shapes.get(owner)}")
    layouts = {}
    for source, shape in shapes.items():
        cut = cut_of(source) if parts > 1 else None
        for number in range(parts) if cut else (0,):
            rename = partial(part_name, part=number) if cut else str
            part = ParamPart(source, shape, cut, number, parts) if cut else None
            own_shape = cut.part_shape(shape, number, parts) if cut else shape
            tied_to = rename(tied[source]) if source in tied else None
            copies = tuple(rename(copy) for copy, owner in tied.items() if owner == source)
            name, unsharded, facts = rename(source), is_unsharded(source, shape), (is_frozen(source), expert_of(source))
            layouts[name] = ParamLayout(name, own_shape, stage_of(source), part, tied_to, copies, unsharded, *facts)
    return layouts


def select_owned(layouts: Layouts) -> list[ParamLayout]:
    """Return the parameters that are optimized, saved and counted: those not tied to another."""
    return [layout for layout in layouts.values() if layout.tied_to is None]


def select_stage(layouts: Layouts, stage: int) -> dict[str, ParamLayout]:
    return {name: layout for name, layout in layouts.items() if layout.stage == stage}


def select_parts(layouts: Layouts, parts: range, experts: range) -> dict[str, ParamLayout]:
    """Return the layouts of a rank with these tensor parts and experts: theirs, and those of all that is not divided."""

    def is_here(layout: ParamLayout) -> bool:
        return (layout.part is None or layout.part.number in parts) and (layout.expert is None or layout.expert in experts)

    return {name: layout for name, layout in layouts.items() if is_here(layout)}


def group_by_vector(layouts: Layouts) -> dict[FlatKey, dict[str, ParamLayout]]:
    """Return the parameters of each flat vector, in order."""
    groups: dict[FlatKey, dict[str, ParamLayout]] = {}
    for name, layout in layouts.items():
        groups.setdefault(layout.flat_key, {})[name] = layout
    return groups


def global_shapes(layouts: Layouts) -> dict[str, Shape]:
    """Return the global shapes of the parameters that are optimized and saved, in the order of the model."""
    return {layout.source: layout.global_shape for layout in select_owned(layouts)}


def select_trained(layouts: Layouts) -> dict[str, ParamLayout]:
    """Return the parameters that have gradients; the others are frozen."""
    return {name: layout for name, layout in layouts.items() if not layout.frozen}
