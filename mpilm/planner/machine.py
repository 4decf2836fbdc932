"""A machine as `doctor --calibrate` has measured it: seconds of everything a training step is made of.

Rates are kept as curves over the size that they depend on, since a small matrix is slow for its size and a large vector does
not fit the cache. All were measured with as many ranks of a node at work as a job would have there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import mpilm
from mpilm.errors import FileError

FORMAT = 1
Curve = Sequence[Sequence[float]]  # (size, seconds of one unit) by rising size
Surface = Sequence[tuple[float, Curve]]  # a curve for each of some rising sizes of another kind


def at(curve: Curve, size: float) -> float:
    """The value of a curve, between two points a straight line on logarithmic axes; beyond its ends that of the end."""
    place = bisect_right([point[0] for point in curve], size)
    if place in (0, len(curve)):
        return curve[max(0, place - 1)][1]
    (a, low), (b, high) = curve[place - 1], curve[place]
    part = math.log(size / a) / math.log(b / a)
    return low ** (1 - part) * high**part


def on(surface: Surface, size: float, other: float) -> float:
    """The value of a surface: the first size chooses among the curves, the other a point on them."""
    return at([(first, at(curve, other)) for first, curve in surface], size)


@dataclass(frozen=True)
class Compute:
    """Seconds of one unit of work on a rank with so many threads, computing in `dtype`; forward and backward apart."""

    threads: int
    ranks: int
    """Ranks of the node that were at work at once."""
    dtype: str
    linear_forward: Surface
    """Of a matrix product, by tokens and by the geometric mean of the matrix's two sides; seconds an operation."""
    linear_backward: Surface
    attention_forward: Surface
    """Of the core of attention, by context length and width of a head; seconds an operation, of of a causal one by half."""
    attention_backward: Surface
    rest_forward: Mapping[str, Curve]
    """Of a block of an architecture, besides those two: by floats that it keeps for backward; seconds a float."""
    rest_backward: Mapping[str, Curve]
    loss_forward: Curve
    """Of the loss, the matrix of the logits left out, by logits; seconds a logit."""
    loss_backward: Curve
    training: Curve = ((1.0, 1.0),)
    """How much longer whole steps compute than the sum of these, by floats that a block keeps: what another operation has put
    into the caches is in the way."""


@dataclass(frozen=True)
class Memory:
    """Seconds an element of what runs through memory, in float32, by elements."""

    threads: int
    ranks: int
    add: Curve
    """Add one vector to another: gradients."""
    scale: Curve
    norm: Curve
    adamw: Curve
    embedding: Curve
    """Backward of an embedding, by the elements of its matrix."""
    fresh: Curve
    """Fill memory that the kernel has yet to give."""


@dataclass(frozen=True)
class Network:
    """Messages between ranks that are as far apart as the name says, while all of them talk."""

    ranks: int
    """Ranks that were measured, one communicator of them all."""
    latency_s: float
    """Of a message of one float."""
    bandwidth: float
    """Bytes a second of a large message from one rank to another."""
    exchange: Curve
    """All-to-all of a vector, by elements on a rank; seconds for each element that leaves it."""
    gather: Curve
    """All-gather into a vector, by elements; seconds for each element that comes in."""
    reduce_s: float
    """A sum of one number over the ranks."""
    shared: Curve = ()
    """The sum in shared memory, complete on every rank, by elements; seconds an element. Empty: there is none."""


@dataclass(frozen=True)
class Machine:
    """One kind of node, and what lies between several of them."""

    format: int
    mpilm: str
    torch: str
    processor: str
    mpi: str
    device: str
    made: str
    nodes: int
    ranks_per_node: int
    gpus: int
    """Of a node; 1 where ranks compute on its processor."""
    cores: int
    """Of a node, as far as its ranks may use them."""
    memory_bytes: int
    """Of a node, or of a GPU: what its ranks may fill."""
    program_bytes: int
    """What a rank has in use before there is a model."""
    compute: tuple[Compute, ...]
    memory: tuple[Memory, ...]
    within: Network | None
    across: Network | None
    write_bandwidth: float
    """Bytes a second that one rank writes to the folder in which it was measured."""
    step_s: float
    """What a step takes besides all of this: Python, the loss, small messages."""
    source: str = "machine.json"

    def computing(self, ranks_per_node: int, dtype: str) -> Compute:
        """The rates where so many ranks share a node: those measured nearest to it."""
        mine = [rates for rates in self.compute if rates.dtype == dtype]
        if not mine:
            raise FileError(f"{self.source} knows nothing of {dtype}: calibrate anew (mpilm.doctor --calibrate)")
        return min(mine, key=lambda rates: _distance(rates.ranks, ranks_per_node))

    def streaming(self, ranks_per_node: int) -> Memory:
        """The same of what runs through memory."""
        return min(self.memory, key=lambda rates: _distance(rates.ranks, ranks_per_node))


def _distance(have: int, want: int) -> float:
    return abs(math.log(have / max(1, want)))


def write(path: Path, machine: Machine) -> None:
    """Keep a machine in a file; raises FileError."""
    content = {name: value for name, value in dataclasses.asdict(machine).items() if name != "source"}
    try:
        path.write_text(_laid_out(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from None


def _laid_out(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and numbers of five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(short(value))}" for key, value in content.items()) + "\n}"


def read(name: str, flag: str = "--machine") -> Machine:
    """The machine in a file that a flag names; raises FileError that says what is missing in it or wrong."""
    try:
        found = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(
            f"{flag} {name}: no such file; measure this machine first: mpirun -n RANKS python -m mpilm.doctor --calibrate"
        ) from None
    except (OSError, ValueError) as error:
        raise FileError(f"{flag} {name}: cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileError(f"{flag} {name} is not of this format ({FORMAT}); make it anew: mpilm.doctor --calibrate")
    try:
        machine = _built(Machine, {**found, "source": name}, "")
    except (TypeError, ValueError, KeyError) as error:
        raise FileError(f"{flag} {name}: {error}; make it anew: mpilm.doctor --calibrate") from None
    if machine.mpilm != mpilm.__version__:
        raise FileError(
            f"{flag} {name} was made by mpilm {machine.mpilm}, and this is {mpilm.__version__}: what a step takes may have "
            "changed; make it anew: mpilm.doctor --calibrate"
        )
    return machine


def _built(kind: Any, found: Any, where: str) -> Any:
    """A dataclass from what JSON holds, every number of it checked; raises ValueError naming the key."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{where or 'the file'} is no table")
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):
        key = f"{where}.{item.name}" if where else item.name
        if item.name not in found:
            if item.default is not dataclasses.MISSING:
                continue
            raise ValueError(f"{key} is missing")
        values[item.name] = _value(hints[item.name], found[item.name], key)
    return kind(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    if hint is str:
        return str(value)
    if hint in (int, float):
        return hint(_above_zero(value, key))
    if hint == Network | None:
        return None if value is None else _built(Network, value, key)
    if hint in (tuple[Compute, ...], tuple[Memory, ...]):
        return tuple(_built(hint.__args__[0], each, f"{key}[{i}]") for i, each in enumerate(value))
    return _numbers(value, key)


def _numbers(value: Any, key: str) -> Any:
    """Curves, surfaces, and tables of them."""
    if isinstance(value, Mapping):
        return {name: _numbers(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list):
        return tuple(_numbers(each, key) for each in value)
    return _above_zero(value, key)


def _above_zero(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, where a number above zero belongs")
    return value
