"""The audit of one run: its certificate, its checkpoints, and steps recomputed on these ranks against what the run recorded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mpilm.checkpoint.format import checkpoint_name, checkpoint_step, list_checkpoints
from mpilm.checkpoint.verify import Verifier, run_on_root_with_verify
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.engine.hardware import describe_program
from mpilm.engine.step import StepResult
from mpilm.errors import ConfigError, NotReproducedError
from mpilm.formatting import count_noun, name_some
from mpilm.mesh.shape import AXES
from mpilm.report.read import read_run
from mpilm.trainer.certificate import CERTIFICATE, CertificateLine, certified_settings, digest_facts, read_certificate
from mpilm.verification.arguments import AuditArguments
from mpilm.verification.replayed_run import ReplayedRun, check_is_run, find_stored_run, open_replayed_run

PrintLine = Callable[[str], None]
Lines = Mapping[int, CertificateLine]  # by step


class CertificateSummary(NamedTuple):
    """A certificate that has been checked from its first line to its last."""

    line_count: int
    first: int  # step of the first line
    last: int  # step of the last one
    lines: Lines  # those of the steps asked for


def audit_run(arguments: AuditArguments, world: Comm, print_line: PrintLine) -> None:
    """Check the certificate and, if asked, recompute steps. Collective; raises CollectiveError at the first difference."""
    folder, asked = Path(arguments.runs[0]), arguments.step_range()
    stored = find_stored_run(folder, *asked, world) if asked else None
    certificate = _share_certificate(folder, range(stored.step, asked[1] + 1) if stored and asked else range(0), world)
    if certificate.line_count:
        steps = f"steps {certificate.first} to {certificate.last}"
        print_line(f"certificate  {count_noun(certificate.line_count, 'line')}, {steps}, unbroken")
    elif asked is None:
        raise CollectiveError(ConfigError(f"{folder} has no {CERTIFICATE} to check; --steps FIRST:LAST recomputes steps"))
    else:
        print_line(f"certificate  none: {folder / CERTIFICATE} does not exist, or is empty")
    if stored is None or asked is None:
        return print_line("nothing is recomputed without --steps FIRST:LAST")
    (first, last), lines = asked, certificate.lines
    rows = world.broadcast_json(run_on_root(world, lambda: _read_rows(folder, first, last)))
    replayed = open_replayed_run(stored, arguments, world)
    notes = [*replayed.notes, *_check_facts(replayed, lines)]
    if certificate.line_count and certificate.last < last:
        notes.append(f"the certificate ends at step {certificate.last}: later lines may have been removed")
    if not rows:
        notes.append(f"metrics.jsonl has no loss of steps {first} to {last}, or cannot be read")
    for note in notes:
        print_line(f"note         {note}")
    origin = stored.checkpoint.name if stored.checkpoint else "the start"
    sizes = dict(zip(AXES, replayed.mesh.shape.sizes))
    layout = ", ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "no axis divided"
    print_line(f"recomputing  steps {stored.step + 1} to {last} from {origin} on {count_noun(world.size, 'rank')} ({layout})")
    unlined = _check_stored(replayed, last, lines, world)
    counts = _recompute(replayed, first, last, lines, {int(step): row for step, row in rows.items()}, unlined, print_line)
    if not counts:
        problem = f"--steps {first}:{last}: the run recorded no loss, state or checkpoint of these steps to compare"
        raise CollectiveError(ConfigError(f"{problem}; choose steps that metrics.jsonl or {CERTIFICATE} lists"))
    print_line(f"these bits   steps {first} to {last}, equal in {', '.join(counts)}")


def _share_certificate(folder: Path, steps: range, world: Comm) -> CertificateSummary:
    """Check a certificate on rank 0, and return its lines of these steps on all. Collective; raises CollectiveError."""

    def read() -> list[Any]:
        check_is_run(folder)
        found, lines = list[int](), list[Any]()
        for line in read_certificate(folder):
            found.append(line.step)
            lines += [[dict(line.fields), line.digest]] * (line.step in steps)
        return [len(found), *(found[:1] or [0]), *(found[-1:] or [0]), lines]

    line_count, first, last, lines = world.broadcast_json(run_on_root(world, read))
    by_step = {fields["step"]: CertificateLine(fields, digest) for fields, digest in lines}
    return CertificateSummary(line_count, first, last, by_step)


def _check_facts(replayed: ReplayedRun, lines: Lines) -> list[str]:
    """Raise CollectiveError if settings or data are not those of the certificate; return a note if the program is not."""
    settings, world = certified_settings(replayed.config), replayed.mesh.world
    names = {"settings": "the settings in the run folder", "data": "text, tokenizer or the weights to start with"}
    now = {"settings": digest_facts(settings), "data": digest_facts(replayed.content), "program": describe_program(world)}
    recomputed = [line for line in lines.values() if line.step > replayed.stored.step]
    for line in recomputed:
        for name, text in names.items():
            if line.fields[name] != now[name]:
                problem = f"{text} are not those with which step {line.step} was computed, by its line in {CERTIFICATE}"
                raise CollectiveError(NotReproducedError(problem))
    others = sorted({line.fields["program"] for line in recomputed} - {now["program"]})
    return [f"the source of mpilm differs: {'; '.join(others)} then, {now['program']} now"] if others else []


def _read_rows(folder: Path, first: int, last: int) -> dict[int, list[float]]:
    """Return loss and gradient norm of the logged steps among these."""
    columns = read_run(folder).metrics.columns
    rows = zip(*(columns[name].tolist() for name in ("step", "loss", "grad_norm")))
    return {int(step): [loss, norm] for step, loss, norm in rows if first <= step <= last and loss == loss}


def _check_stored(replayed: ReplayedRun, last: int, lines: Lines, world: Comm) -> list[int]:
    """Compare the checkpoints of the steps to recompute, as they lie on the disk, with the certificate, and then with their own
    manifests; return the steps of those without a line. Collective; raises CollectiveError."""
    folder, unlined = replayed.stored.folder / "checkpoints", list[int]()
    names = world.broadcast_json([path.name for path in list_checkpoints(folder)])
    for path in [folder / name for name in names]:
        step = checkpoint_step(path) or 0
        if not replayed.stored.step <= step <= last:
            continue
        if step in lines:
            problem = f"{path} is not what the run computed, by its certificate"
            refuse_differences(problem, lines[step].tensors, replayed.digest_checkpoint(path))
        else:
            unlined.append(step)
        run_on_root_with_verify(world, partial(_verify, path))
    return unlined


def _verify(path: Path, verify: Verifier) -> None:
    verify(path)


def _recompute(
    replayed: ReplayedRun,
    first: int,
    last: int,
    lines: Lines,
    rows: Mapping[int, Sequence[float]],
    unlined: Sequence[int],
    print_line: PrintLine,
) -> list[str]:
    """Recompute the steps up to `last` and compare them with what the run has recorded; return what was compared, as text."""
    start, compared = replayed.stored.step + 1, dict.fromkeys(("loss", "line", "checkpoint"), 0)
    for done, result in replayed.advance(start, last):
        # Of steps that were skipped or rewound one after the other, the records before the last are of states the run has left.
        was_left = result is None and done + 1 in replayed.stored.skipped
        line, is_asked = None if was_left else lines.get(done), done >= first
        if result is not None and (problem := next(_find_problems(result, rows.get(done), line), "")):
            where = f"step {done} (the first that differs of {start} to {last})"
            raise CollectiveError(NotReproducedError(f"{where}: {problem}"))
        compared["loss"] += done in rows and result is not None
        if line is not None:
            problem = f"step {done} (the losses up to it are equal): the state is not that of the certificate"
            refuse_differences(problem, line.tensors, replayed.model.digest_state())
            compared["line"] += is_asked
        elif done in unlined and not was_left:
            path = replayed.stored.folder / "checkpoints" / checkpoint_name(done)
            problem = f"step {done}: the state is not that of {path}"
            refuse_differences(problem, replayed.digest_checkpoint(path), replayed.model.digest_state())
            compared["checkpoint"] += is_asked
        outcome = "skipped by the run" if result is None else f"loss {result.loss:.6f}"
        print_line(f"  step {done}: {outcome}" + ", equal in every tensor" * (line is not None))
    names = {"loss": "logged loss", "line": "certified state", "checkpoint": "checkpoint"}
    return [count_noun(number, names[key]) for key, number in compared.items() if number]


def _find_problems(result: StepResult, row: Sequence[float] | None, line: CertificateLine | None) -> Iterator[str]:
    """Yield what differs between a recomputed step and its records, the most telling first."""
    if line is not None and line.fields["losses"]:
        for microbatch, (then, now) in enumerate(zip(line.fields["losses"], result.losses)):
            if then != now:
                parts = len(result.losses)
                yield f"the loss of microbatch {microbatch} of {parts} was {then!r} and is {now!r} now"
    recorded = [("metrics.jsonl", *row)] if row is not None else []
    recorded += [(CERTIFICATE, line.fields["loss"], line.fields["grad_norm"])] if line is not None else []
    for source, loss, norm in recorded:
        for name, then, now in (("loss", loss, result.loss), ("gradient norm", norm, result.grad_norm)):
            if then is not None and then != now:
                yield f"{source} has the {name} {then!r}, recomputed it is {now!r}"


def refuse_differences(problem: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise CollectiveError if the digests of tensors differ, naming the first that do."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        raise CollectiveError(NotReproducedError(f"{problem}: {name_some(names)}"))
