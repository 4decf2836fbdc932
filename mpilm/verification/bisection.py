"""The first difference of two runs: from their certificates the stretch, by recomputing both in it the step and the cause."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config.parse import merge_settings
from mpilm.config.schema import Config, microbatch_count
from mpilm.data.files import hex_digest
from mpilm.errors import ConfigError, NotReproducedError
from mpilm.formatting import count_noun, name_some
from mpilm.trainer.certificate import certified_settings, digest_facts, read_certificate
from mpilm.verification.arguments import AuditArguments
from mpilm.verification.audit import PrintLine
from mpilm.verification.replayed_run import StoredRun, check_is_run, find_stored_run, open_replayed_run


@dataclass(frozen=True)
class StepTrace:
    """Digests of one recomputed step, in the order in which a difference of one explains those of the next."""

    batches: list[str]  # digests of the microbatches
    losses: tuple[float, ...]  # of their sequence parts
    gradients: Mapping[str, str]  # digests of the summed gradients by tensor
    tensors: Mapping[str, str]  # digests of the state after the step


class Parting(NamedTuple):
    """Steps between which the certificates of two runs part."""

    before: int  # last common step with equal states; 0: none
    after: int | None  # the next common step, with different states; None: there is none
    common_count: int  # of certified steps
    ends: Sequence[int]  # last step of each certificate
    lines: Sequence[Mapping[str, Any]]  # fields of both lines of step `after`, or of the last common step


def find_first_difference(arguments: AuditArguments, world: Comm, print_line: PrintLine) -> None:
    """Find the first certified step at which two runs differ, recompute both from the last equal one, and name step, microbatch
    or tensor, and cause. Collective; raises CollectiveError if the runs differ."""
    folders = [Path(run) for run in arguments.runs]
    parting = Parting(*world.broadcast_json(run_on_root(world, lambda: _find_parting(folders))))
    causes = list(_explain(parting.lines, folders, world))
    for text in causes:
        print_line(f"differs      {text}")
    before, after = parting.before, parting.after
    if after is None:
        longer = [f"; {folder} goes on to step {end}" for folder, end in zip(folders, parting.ends) if end > before]
        count = count_noun(parting.common_count, "common line")
        return print_line(f"equal bits   in all {count}, up to step {before}{''.join(longer)}")
    print_line(f"equal bits   up to step {before}" if before else "equal bits   in no common line")
    print_line(f"different    from step {after} on; recomputing both up to it")
    traces = [_trace_run(folder, before, after, arguments, world, print_line) for folder in folders]
    because = f"; the runs differ in {'; '.join(causes)}" if causes else ""
    raise CollectiveError(NotReproducedError(_name_difference(folders, traces, parting.lines) + because))


def _find_parting(folders: Sequence[Path]) -> Parting:
    """Find where two runs part, by bisection: once different, they do not become equal again. Raises ConfigError without a
    common step, and FileError or DataError."""
    for folder in folders:
        check_is_run(folder)
    one, other = ({line.step: digest_facts(line.tensors) for line in read_certificate(folder)} for folder in folders)
    common = sorted(one.keys() & other.keys())
    if not common:
        problem = "have no certified step in common: both need a certificate.jsonl (--run.certify-every of mpilm.train)"
        raise ConfigError(f"{folders[0]} and {folders[1]} {problem}")
    low = bisect_left(common, True, key=lambda step: one[step] != other[step])
    step = common[min(low, len(common) - 1)]
    lines = [dict(next(line for line in read_certificate(folder) if line.step == step).fields) for folder in folders]
    after = step if low < len(common) else None
    return Parting(common[low - 1] if low else 0, after, len(common), [max(one), max(other)], lines)


def _explain(lines: Sequence[Mapping[str, Any]], folders: Sequence[Path], world: Comm) -> Iterator[str]:
    """Yield what differs between the two runs besides their results."""
    if lines[0]["settings"] != lines[1]["settings"]:
        step = lines[0]["step"]
        one, other = (_read_settings(find_stored_run(folder, step, step, world)) for folder in folders)
        yield from (f"{name}: {one[name]!r} and {other.get(name)!r}" for name in one if one[name] != other.get(name))
    if lines[0]["data"] != lines[1]["data"]:
        yield "data: the text, the tokenizer or the weights to start with"
    if lines[0]["program"] != lines[1]["program"]:
        yield f"program: {lines[0]['program']} and {lines[1]['program']}"


def _read_settings(stored: StoredRun) -> dict[str, Any]:
    return certified_settings(merge_settings(Config(), stored.settings, str(stored.folder)))


def _trace_run(
    folder: Path, before: int, after: int, arguments: AuditArguments, world: Comm, print_line: PrintLine
) -> dict[int, StepTrace]:
    """Recompute a run up to step `after` and return the traces of the steps behind `before`. Collective."""
    stored, traces = find_stored_run(folder, before + 1, after, world), dict[int, StepTrace]()
    replayed = open_replayed_run(stored, arguments, world)
    for done, result in replayed.advance(stored.step + 1, after):
        if done > before and result is not None:
            microbatches = (replayed.batches.training_batch(done - 1, m) for m in range(microbatch_count(replayed.config)))
            batches = [hex_digest(batch.tokens.numpy().tobytes(), batch.targets.numpy().tobytes()) for batch in microbatches]
            model = replayed.model
            traces[done] = StepTrace(batches, result.losses, model.digest_gradients(), model.digest_state())
        print_line(f"  {folder} step {done}: " + ("skipped" if result is None else f"loss {result.loss:.6f}"))
    return traces


def _name_difference(
    folders: Sequence[Path], traces: Sequence[Mapping[int, StepTrace]], lines: Sequence[Mapping[str, Any]]
) -> str:
    """Return the first difference: between the recomputed steps or, if these are equal, between a run and its own record."""
    one, other = traces
    for step in sorted(one.keys() & other.keys()):
        if found := _find_in_step(one[step], other[step]):
            return f"{folders[0]} and {folders[1]} differ first in step {step}: {found}"
    step = lines[0]["step"]
    wrong = [str(folder) for folder, line in zip(folders, lines) if line["tensors"] != one[step].tensors]
    reason = "these ranks do not compute what it recorded, so its processors, its memory or its program differed"
    return f"recomputed, both runs are equal up to step {step}; the record of {' and of '.join(wrong)} is another: {reason}"


def _find_in_step(one: StepTrace, other: StepTrace) -> str:
    """Return the first difference within a step, or "" if there is none."""
    parts = len(one.losses) // max(1, len(one.batches))
    if (place := _first_differing(one.batches, other.batches)) is not None:
        return f"microbatch {place} of {len(one.batches)} has other tokens"
    if (place := _first_differing(one.losses, other.losses)) is not None:
        return f"the loss of microbatch {place // max(1, parts)}: {one.losses[place]!r} and {other.losses[place]!r}"
    for what, first, second in (("gradient", one.gradients, other.gradients), ("update", one.tensors, other.tensors)):
        names = [name for name in first if first[name] != second.get(name)]
        if names:
            return f"the {what} of {name_some(names)}"
    return ""


def _first_differing(one: Any, other: Any) -> int | None:
    differing = [place for place, (a, b) in enumerate(zip(one, other)) if a != b]
    return differing[0] if differing else None if len(one) == len(other) else min(len(one), len(other))
