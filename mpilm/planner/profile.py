"""The profile of a machine, as `doctor --calibrate` measures it: the time of everything that a training step is made of.

Rates are curves over the size that they depend on: a small matrix is slow for its size, and a large vector does not fit into
the cache. They were measured with as many ranks a node at work as a job would have there.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import mpilm
from mpilm.data.files import MAX_JSON_BYTES, file_errors, parse_json
from mpilm.errors import DataError, FileError
from mpilm.formatting import format_value

FORMAT, LARGEST = 1, 1e36
Curve = tuple[tuple[float, float], ...]  # (size, seconds a unit), by rising size
Surface = tuple[tuple[float, Curve], ...]  # (first size, curve over the second size), by rising first size


def interpolate(curve: Curve, size: float) -> float:
    """Return the value of a curve: straight lines on logarithmic axes, constant beyond both ends."""
    above = bisect_right(curve, size, key=lambda point: point[0])
    if above in (0, len(curve)):
        return curve[max(0, above - 1)][1]
    (left, low), (right, high) = curve[above - 1], curve[above]
    fraction = math.log(size / left) / math.log(right / left)
    return low ** (1 - fraction) * high**fraction


def interpolate2d(surface: Surface, first: float, second: float) -> float:
    """Return the value of a surface at two sizes."""
    return interpolate(tuple((size, interpolate(curve, second)) for size, curve in surface), first)


def total_s(curve: Curve, count: float) -> float:
    """Return the seconds of one call on `count` units."""
    return count * interpolate(curve, count)


@dataclass(frozen=True)
class ComputeRates:
    """Seconds a unit of work on one rank, forward and backward apart."""

    threads: int
    ranks: int  # ranks of the node that computed at the same time
    dtype: str
    linear_forward: Surface  # matrix product: seconds a FLOP, by tokens and by the geometric mean of the matrix's sides
    linear_backward: Surface
    attention_forward: Surface  # attention core: seconds a FLOP (causal counts half), by context length and head width
    attention_backward: Surface
    rest_forward: Mapping[str, Curve]  # by architecture, all else in a block: seconds a float that it keeps for backward
    rest_backward: Mapping[str, Curve]
    loss_forward: Curve  # loss without the product that makes the logits: seconds a logit
    loss_backward: Curve
    training: Curve = ((1.0, 1.0),)  # slowdown of whole steps against these parts, by floats that a block keeps: cold caches


@dataclass(frozen=True)
class MemoryRates:
    """Seconds an element of float32 operations that are bound by memory, by elements."""

    threads: int
    ranks: int
    add: Curve  # one vector to another: gradients
    scale: Curve
    norm: Curve
    adamw: Curve
    embedding: Curve  # backward of an embedding, by the elements of its matrix
    fresh: Curve  # filling memory whose pages the kernel has yet to provide


@dataclass(frozen=True)
class NetworkRates:
    """Messages between the ranks of one node, or of several, while all of them communicate."""

    ranks: int  # size of the communicator that was measured
    latency_s: float
    bandwidth: float  # bytes a second of a large message from one rank to another
    exchange: Curve  # all-to-all: seconds an element that leaves the rank, by elements on a rank
    gather: Curve  # all-gather: seconds an element that arrives, by elements of the result
    reduce_s: float  # all-reduce of one number
    shared: Curve = ()  # all-reduce in shared memory: seconds an element, by elements; empty: no shared memory


@dataclass(frozen=True)
class MachineProfile:
    """One kind of node and the network between several; the fields are the keys of machine.json."""

    format: int
    mpilm: str
    torch: str
    processor: str
    mpi: str
    device: str
    made: str
    nodes: int
    ranks_per_node: int
    gpus: int  # a node; 1 if ranks compute on its processor
    cores: int  # of a node that its ranks may use
    memory_bytes: int  # of a node, or of a GPU, that ranks may fill
    program_bytes: int  # that a rank uses before the model is built
    compute: tuple[ComputeRates, ...]
    memory: tuple[MemoryRates, ...]
    within: NetworkRates | None
    across: NetworkRates | None
    step_s: float  # of a step that nothing else explains: Python, the loss, small messages
    source: str = "machine.json"  # file that the profile was read from


def write_profile(path: Path, profile: MachineProfile) -> None:
    """Write a profile as JSON, one key a line and five digits a number; raises FileError."""
    content = json.loads(json.dumps(asdict(profile)), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "source")
    with file_errors(path, "written"):
        path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_profile(name: str, flag: str = "--machine") -> MachineProfile:
    """Read the profile in the file that a flag names; raises FileError that says what is missing or wrong."""
    try:
        with open(Path(name).expanduser(), "rb") as file:
            content = parse_json(file.read(MAX_JSON_BYTES), "it")
        if content.get("format") != FORMAT:
            raise ValueError(f"it is not a machine profile of format {FORMAT}")
        profile: MachineProfile = _from_json(MachineProfile, {**content, "source": name}, "")
        if profile.mpilm != mpilm.__version__:
            raise ValueError(f"mpilm {profile.mpilm} made it, and the steps of {mpilm.__version__} may take another time")
        return profile
    except (OSError, ValueError, DataError) as error:
        problem, advice = getattr(error, "strerror", None) or error, "mpirun -n RANKS python -m mpilm.doctor --calibrate"
        raise FileError(f"{flag} {name} cannot be used: {problem}; measure this machine: {advice}") from None


def _from_json(hint: Any, value: Any, key: str) -> Any:
    """Return a JSON value as the type that a dataclass field states; raises ValueError that names the key."""
    arguments = get_args(hint)
    if isinstance(hint, UnionType):  # X | None
        return None if value is None else _from_json(arguments[0], value, key)
    if hint is str:
        return str(value)
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, hint)) or not 0 < value < LARGEST:
            number = "whole number" if hint is int else "number"
            raise ValueError(f"{key} is {format_value(value)}, not a {number} above zero")
        return hint(value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{key} is not a list")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{key} has {len(value)} entries, not {len(kinds)}")
        entries = tuple(_from_json(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))
        sizes = [entry[0] for entry in entries if isinstance(entry, tuple)]  # of a curve or surface
        if any(size >= after for size, after in pairwise(sizes)) or not (entries or key.endswith(".shared")):
            raise ValueError(f"{key} must hold entries of rising size")
        return entries
    if not isinstance(value, Mapping):
        raise ValueError(f"{key or 'the file'} is not a table")
    prefix = f"{key}." if key else ""
    if arguments:  # Mapping[str, X]
        return {name: _from_json(arguments[1], item, prefix + name) for name, item in value.items()}
    for item in fields(hint):
        if item.name not in value and item.default is MISSING:
            raise ValueError(f"{prefix}{item.name} is missing")
    hints = {name: each for name, each in get_type_hints(hint).items() if name in value}
    return hint(**{name: _from_json(each, value[name], prefix + name) for name, each in hints.items()})
