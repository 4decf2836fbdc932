"""The audit of one run: its certificate, its checkpoints, and steps recomputed on these ranks against what the run recorded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpilm.checkpoint.format import checkpoint_name, checkpoint_step, list_checkpoints
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.engine.hardware import describe_program
from mpilm.engine.step import StepResult
from mpilm.errors import ConfigError, NotReproducedError
from mpilm.formatting import count_noun
from mpilm.mesh.shape import AXES
from mpilm.report.read import read_run
from mpilm.trainer.certificate import CERTIFICATE, CertificateLine, read_certificate
from mpilm.verification.arguments import AuditArguments
from mpilm.verification.replayed_run import ReplayedRun, find_stored_run, open_replayed_run

PrintLine = Callable[[str], None]
MAX_NAMES = 4  # of tensors, in a message
Lines = Mapping[int, CertificateLine]  # by step


def audit_run(arguments: AuditArguments, world: Comm, print_line: PrintLine) -> None:
    """Check the certificate and, if asked, recompute steps. Collective; raises CollectiveError at the first difference."""
    folder, asked = Path(arguments.runs[0]), arguments.step_range()
    lines = share_certificate(folder, world)
    if lines:
        print_line(f"certificate  {count_noun(len(lines), 'line')}, steps {min(lines)} to {max(lines)}, unbroken")
    else:
        print_line(f"certificate  none: {folder / CERTIFICATE} does not exist")
    if asked is None:
        return print_line("nothing is recomputed without --steps FIRST:LAST")
    first, last = asked
    rows = world.broadcast_json(run_on_root(world, lambda: _read_rows(folder, first, last)))
    stored = find_stored_run(folder, first - 1, world)
    replayed = open_replayed_run(stored, arguments, world)
    if last > replayed.config.train.steps:
        raise CollectiveError(ConfigError(f"--steps {arguments.steps}: the run has {replayed.config.train.steps} steps"))
    programs = {line.fields["program"] for line in lines.values() if line.step > stored.step}
    others = sorted(programs - {describe_program(world)})
    changed = [f"the source of mpilm differs: {'; '.join(others)} then, {describe_program(world)} now"] if others else []
    for note in (*replayed.notes, *changed):
        print_line(f"note         {note}")
    origin = stored.checkpoint.name if stored.checkpoint else "the start"
    sizes = dict(zip(AXES, replayed.mesh.shape.sizes))
    layout = ", ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "no axis divided"
    print_line(f"recomputing  steps {stored.step + 1} to {last} from {origin} on {count_noun(world.size, 'rank')} ({layout})")
    _check_stored(replayed, stored.step, last, lines, world)
    counts = _recompute(replayed, last, lines, {int(step): row for step, row in rows.items()}, print_line)
    print_line(f"these bits   steps {first} to {last}: {', '.join(counts)} are equal")


def share_certificate(folder: Path, world: Comm) -> dict[int, CertificateLine]:
    """Return the lines of a run's certificate, checked, by step; none if it has no certificate. Collective; raises."""

    def read() -> list[Any]:
        lines = read_certificate(folder) if (folder / CERTIFICATE).exists() else []
        return [[dict(line.fields), line.digest] for line in lines]

    lines = world.broadcast_json(run_on_root(world, read))
    return {fields["step"]: CertificateLine(fields, digest) for fields, digest in lines}


def _read_rows(folder: Path, first: int, last: int) -> dict[int, list[float]]:
    """Return loss and gradient norm of the logged steps among these."""
    columns = read_run(folder).metrics.columns
    rows = zip(*(columns[name].tolist() for name in ("step", "loss", "grad_norm")))
    return {int(step): [loss, norm] for step, loss, norm in rows if first <= step <= last and loss == loss}


def _check_stored(replayed: ReplayedRun, first: int, last: int, lines: Lines, world: Comm) -> None:
    """Compare the checkpoints of these steps, as they lie on disk, with the certificate. Collective; raises CollectiveError."""
    folder = replayed.stored.folder / "checkpoints"
    names = world.broadcast_json([path.name for path in list_checkpoints(folder)])
    for path in [folder / name for name in names]:
        step = checkpoint_step(path) or 0
        if first <= step <= last and step in lines:
            problem = f"{path} is not what the run computed, by its certificate"
            refuse_differences(problem, lines[step].tensors, replayed.digest_checkpoint(path))


def _recompute(
    replayed: ReplayedRun, last: int, lines: Lines, rows: Mapping[int, Sequence[float]], print_line: PrintLine
) -> list[str]:
    """Recompute the steps up to `last` and compare them with what the run has recorded; return what was compared, as text."""
    first, compared = replayed.stored.step + 1, dict.fromkeys(("loss", "line"), 0)
    for done, result in replayed.advance(first, last):
        line = lines.get(done)
        if problem := next(_find_problems(result, rows.get(done), line), ""):
            where = f"step {done} (the first that differs of {first} to {last})"
            raise CollectiveError(NotReproducedError(f"{where}: {problem}"))
        compared["loss"] += done in rows
        if line is not None:
            problem = f"step {done} (the losses up to it are equal): the state is not that of the certificate"
            refuse_differences(problem, line.tensors, replayed.model.digest_state())
            compared["line"] += 1
        print_line(f"  step {done}: loss {result.loss:.6f}" + ", equal in every tensor" * (line is not None))
    path = replayed.stored.folder / "checkpoints" / checkpoint_name(last)
    compared["checkpoint"] = not lines and replayed.mesh.world.broadcast_json(path.is_dir())
    if compared["checkpoint"]:  # the run has no certificate
        stored = replayed.digest_checkpoint(path)
        refuse_differences(f"step {last}: the state is not that of {path}", stored, replayed.model.digest_state())
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
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        raise CollectiveError(NotReproducedError(f"{problem}: {', '.join(names[:MAX_NAMES])}{more} differ"))
