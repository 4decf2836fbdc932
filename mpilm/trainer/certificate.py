"""RUN/certificate.jsonl: what the run computed, in a chain of lines that no layout changes.

A line is a JSON object with the facts of a step (loss and gradient norm, losses of its microbatches, numbers of the samples
read since the line before, digests of settings, data and program) and the digest of each tensor of the state. Its "root" is the
root of the Merkle tree (RFC 6962, section 2.1, by sha256) over all of these; "previous" is the sha256 of the line before. Thus
two runs with equal roots had equal bits, and a line that was edited later does not fit those after it. mpilm/audit.py reads it.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.config.schema import Config, result_settings
from mpilm.data.files import file_errors, hex_digest, parse_json
from mpilm.errors import DataError
from mpilm.telemetry.metrics import length_through_step, parse_row

CERTIFICATE = "certificate.jsonl"
CHAIN = ("root", "previous")  # the fields that the others determine
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "step": int, "loss": (float, type(None)), "grad_norm": (float, type(None)), "losses": list, "samples": list,
    "settings": str, "data": str, "program": str, "tensors": dict, "root": str, "previous": str,
}  # fmt: skip


@dataclass(frozen=True)
class CertificateLine:
    """A line of a certificate."""

    fields: Mapping[str, Any]
    digest: str  # sha256 of its text

    @property
    def step(self) -> int:
        return int(self.fields["step"])

    @property
    def tensors(self) -> Mapping[str, str]:
        """The digests of the state."""
        return dict(self.fields["tensors"])


class CertificateWriter:
    """Appends lines to the certificate in a run folder. `step` is the checkpoint that the run resumes from: lines of later
    steps are removed. Raises OSError."""

    def __init__(self, folder: Path, step: int):
        self._file = open(folder / CERTIFICATE, "a+b")  # noqa: SIM115
        self._file.seek(0)
        self._file.truncate(length_through_step(self._file, step))
        self._file.seek(0)
        last = deque(self._file, maxlen=1)
        self._previous = hashlib.sha256(last[0]).hexdigest() if last else ""
        self.last_step = int((parse_row(last[0]) or {}).get("step", step)) if last else step

    def write(self, facts: Mapping[str, Any]) -> None:
        """Append a line with these facts: FIELDS but those of the chain."""
        line = {**facts, "root": merkle_root(list_leaves(facts)), "previous": self._previous}
        text = json.dumps(line).encode() + b"\n"
        self._file.write(text)
        self._file.flush()
        self._previous, self.last_step = hashlib.sha256(text).hexdigest(), facts["step"]

    def close(self) -> None:
        self._file.close()


def list_leaves(facts: Mapping[str, Any]) -> list[str]:
    """Return the leaves of a line's Merkle tree: one for each fact, and one for each tensor."""
    single = [f"{name} {json.dumps(value)}" for name, value in facts.items() if name not in ("tensors", *CHAIN)]
    return [*single, *(f"tensor {name} {digest}" for name, digest in facts["tensors"].items())]


def merkle_root(leaves: Sequence[str]) -> str:
    """Return the root of a Merkle tree (RFC 6962, section 2.1), as hex digits."""
    return _merkle_hash([leaf.encode() for leaf in leaves]).hex()


def _merkle_hash(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) < 2:
        return hashlib.sha256(b"\x00" + leaves[0] if leaves else b"").digest()
    half = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two below their number
    return hashlib.sha256(b"\x01" + _merkle_hash(leaves[:half]) + _merkle_hash(leaves[half:])).digest()


def certified_settings(config: Config) -> dict[str, Any]:
    """Return all settings that determine the result of a run, its number of steps included, from which rates may follow."""
    return result_settings(config) | {"train.steps": config.train.steps}


def digest_facts(facts: Mapping[str, Any]) -> str:
    """Return a digest of settings or other named values, in any order."""
    return hex_digest(json.dumps(dict(sorted(facts.items()))))[:32]


def read_certificate(folder: Path) -> Iterator[CertificateLine]:
    """Yield the lines of a run's certificate, each once it is checked; none if the run has no certificate. Raises FileError, or
    DataError naming the first line that is damaged or does not fit the line before it."""
    path, digest, step = folder / CERTIFICATE, "", 0
    if not path.exists():
        return
    with file_errors(path), open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return  # a job was killed while it wrote this line
            line = _read_line(text, f"{path} line {number}")
            if line.fields["previous"] != digest or line.step <= step:
                problem = f"the chain is broken: line {number} (step {line.step}) was not written after the line before it"
                raise DataError(f"{path}: {problem}; a line before it has been changed, removed or added")
            digest, step = line.digest, line.step
            yield line


def _read_line(text: bytes, place: str) -> CertificateLine:
    fields = parse_json(text, place)
    if wrong := list(_find_wrong_fields(fields)):
        raise DataError(f"{place} is not a line of a certificate: {', '.join(wrong)}")
    if fields["root"] != merkle_root(list_leaves(fields)):
        raise DataError(f"{place} (step {fields['step']}) has been changed: its root is not that of its values")
    return CertificateLine(fields, hashlib.sha256(text).hexdigest())


def _find_wrong_fields(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, kind in FIELDS.items():
        if name not in fields:
            yield f"it has no {name}"
        elif not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            yield f"its {name} has the wrong type"
    yield from (f"unknown field {name}" for name in fields.keys() - FIELDS.keys())
