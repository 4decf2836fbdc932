"""The first difference of two runs: from their certificates the stretch, by recomputing both in it the step and the cause."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.parse import merge_settings
from mpilm.config.schema import Config, flatten, microbatch_count, result_settings
from mpilm.data.files import hex_digest
from mpilm.errors import ConfigError, NotReproducedError
from mpilm.formatting import count_noun
from mpilm.trainer.certificate import CertificateLine
from mpilm.verification.arguments import AuditArguments
from mpilm.verification.audit import MAX_NAMES, PrintLine, share_certificate
from mpilm.verification.replayed_run import StoredRun, find_stored_run, open_replayed_run


@dataclass(frozen=True)
class StepTrace:
    """Digests of one recomputed step, in the order in which a difference of one explains those of the next."""

    batches: list[str]  # digests of the microbatches
    losses: tuple[float, ...]  # of their sequence parts
    gradients: Mapping[str, str]  # digests of the summed gradients by tensor
    tensors: Mapping[str, str]  # digests of the state after the step


def find_first_difference(arguments: AuditArguments, world: Comm, print_line: PrintLine) -> None:
    """Find the first certified step at which two runs differ, recompute both from the last equal one, and name step, microbatch
    or tensor, and cause. Collective; raises CollectiveError if the runs differ."""
    folders = [Path(run) for run in arguments.runs]
    certificates = [share_certificate(folder, world) for folder in folders]
    common = sorted(certificates[0].keys() & certificates[1].keys())
    if not common:
        problem = "have no certified step in common: both need a certificate.jsonl (--run.certify-every of mpilm.train)"
        raise CollectiveError(ConfigError(f"{folders[0]} and {folders[1]} {problem}"))
    before, after = _find_difference(certificates, common)
    causes = list(_explain(certificates, folders, after or common[-1], world))
    for text in causes:
        print_line(f"differs      {text}")
    if after is None:
        ends = [(folder, max(certificate)) for folder, certificate in zip(folders, certificates)]
        longer = "".join(f"; {folder} goes on to step {end}" for folder, end in ends if end > common[-1])
        count = count_noun(len(common), "common line")
        return print_line(f"equal bits   in all {count}, up to step {common[-1]}{longer}")
    print_line(f"equal bits   up to step {before}" if before else "equal bits   in no common line")
    print_line(f"different    from step {after} on; recomputing both up to it")
    traces = [_trace_run(folder, before, after, arguments, world, print_line) for folder in folders]
    lines = [certificate[after] for certificate in certificates]
    because = f"; the runs differ in {'; '.join(causes)}" if causes else ""
    raise CollectiveError(NotReproducedError(_name_difference(folders, traces, lines) + because))


def _find_difference(certificates: list[dict[int, CertificateLine]], common: list[int]) -> tuple[int, int | None]:
    """Return the last certified step up to which both states are equal (0: none), and the first one after it. By bisection: two
    runs that once differ do not become equal again."""
    one, other = certificates
    low, high = 0, len(common)  # states are equal before `low`, and different from `high` on
    while low < high:
        middle = (low + high) // 2
        is_equal = one[common[middle]].tensors == other[common[middle]].tensors
        low, high = (middle + 1, high) if is_equal else (low, middle)
    return common[low - 1] if low else 0, common[low] if low < len(common) else None


def _explain(certificates: list[dict[int, CertificateLine]], folders: list[Path], step: int, world: Comm) -> Iterator[str]:
    """Yield what differs between the two runs besides their results."""
    fields = [certificate[step].fields for certificate in certificates]
    if fields[0]["settings"] != fields[1]["settings"]:
        one, other = (_read_settings(find_stored_run(folder, step, step, world)) for folder in folders)
        yield from (f"{name}: {one[name]!r} and {other.get(name)!r}" for name in one if one[name] != other.get(name))
    if fields[0]["data"] != fields[1]["data"]:
        yield "data: the text, the tokenizer or the weights to start with"
    if fields[0]["program"] != fields[1]["program"]:
        yield f"program: {fields[0]['program']} and {fields[1]['program']}"


def _read_settings(stored: StoredRun) -> dict[str, Any]:
    config = merge_settings(Config(), stored.settings, str(stored.folder))
    return result_settings(config) | {"train.steps": flatten(config)["train.steps"]}


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


def _name_difference(folders: list[Path], traces: list[dict[int, StepTrace]], lines: list[CertificateLine]) -> str:
    """Return the first difference: between the recomputed steps or, if these are equal, between a run and its own record."""
    one, other = traces
    for step in sorted(one.keys() & other.keys()):
        if found := _find_in_step(one[step], other[step]):
            return f"{folders[0]} and {folders[1]} differ first in step {step}: {found}"
    step = lines[0].step
    wrong = [str(folder) for folder, line in zip(folders, lines) if line.tensors != one[step].tensors]
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
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            return f"the {what} of {', '.join(names[:MAX_NAMES])}{more}"
    return ""


def _first_differing(one: Any, other: Any) -> int | None:
    differing = [place for place, (a, b) in enumerate(zip(one, other)) if a != b]
    return differing[0] if differing else None if len(one) == len(other) else min(len(one), len(other))
