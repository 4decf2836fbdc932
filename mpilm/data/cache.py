"""Text that a run prepares for itself: kept in the user's cache, found again by content, shared by any number of jobs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_root
from mpilm.config.schema import DataConfig
from mpilm.data.encode import Progress
from mpilm.data.files import hex_digest, touching
from mpilm.data.gather import digest_files
from mpilm.data.indexed import with_ending
from mpilm.data.prepare import DEFAULT_TOKENIZER, FORMAT, agree_on_sources, prepare, reading_of
from mpilm.data.sources import Source
from mpilm.data.tokenizer import bpe_size, named_tokenizer
from mpilm.errors import DataError

PREFIX = "tokens"
Stat = tuple[int, int]
"""Size in bytes and time of change in nanoseconds."""


def cache_folder() -> Path:
    """MPILM_CACHE, else XDG_CACHE_HOME/mpilm, else ~/.cache/mpilm."""
    if os.environ.get("MPILM_CACHE"):
        return Path(os.environ["MPILM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpilm"


def cached_corpus(data: DataConfig, comm: Comm, eos: bool, progress: Progress) -> Path:
    """The prefix of the token files of this text and tokenizer in the cache, prepared now if need be. Collective.

    Two jobs may do this at once: each prepares in a folder of its own, and the first to finish gives it its name.
    """
    root = Path(comm.broadcast_json(str(cache_folder())))
    sources = agree_on_sources(data, comm)
    before, digests = _digests(root, data.source, sources, comm)
    key = run_on_root(comm, lambda: _key(data, sources, digests, eos))
    folder = root / "corpora" / comm.broadcast_json(key)
    if comm.broadcast_json(with_ending(folder / PREFIX, ".idx").is_file()):
        return folder / PREFIX
    own = with_ending(folder, f".{comm.broadcast_json(secrets.token_hex(4))}")
    try:
        prepare(data, own / PREFIX, comm, eos=eos, progress=progress, sources=sources)
        run_on_root(comm, lambda: _hand_over(own, folder, sources, before))
    finally:
        if comm.rank == 0:
            shutil.rmtree(own, ignore_errors=True)
    return folder / PREFIX


def _hand_over(own: Path, folder: Path, sources: Sequence[Source], before: Sequence[Stat]) -> None:
    for source, stat in zip(sources, before, strict=True):
        if _stat(source.path) != stat:
            raise DataError(f"{source.path}: was changed while it was read; start again when nobody writes to it")
    try:
        os.rename(own, folder)
    except OSError:
        if not with_ending(folder / PREFIX, ".idx").is_file():  # else another job was faster, and has written the same
            with touching(folder, "write"):
                raise


def _key(data: DataConfig, sources: Sequence[Source], digests: Sequence[str], eos: bool) -> str:
    """Everything that the tokens depend on."""
    spec = DEFAULT_TOKENIZER if data.tokenizer == "auto" else data.tokenizer
    tokenizer = f"bpe:{bpe_size(spec)}" if bpe_size(spec) else named_tokenizer(spec).digest
    content = [[source.format, source.codec, digest] for source, digest in zip(sources, digests, strict=True)]
    return hex_digest(json.dumps([FORMAT, content, tokenizer, asdict(reading_of(data)), eos]))[:32]


# Digests of files are remembered with size and time of change, so that files at rest are read once.


def _digests(root: Path, path: str, sources: Sequence[Source], comm: Comm) -> tuple[list[Stat], list[str]]:
    """Stat and digest of every source; only changed ones are read. Collective. Raises FileError."""
    index = root / "files" / f"{hex_digest(str(Path(path).expanduser().resolve()) if path else '')[:32]}.json"
    found = run_on_root(comm, lambda: [_stat(source.path) for source in sources])
    stats: list[Stat] = [(size, time) for size, time in comm.broadcast_json(found)]
    known = comm.broadcast_json(_read_index(index) if comm.rank == 0 else {})
    digests = {s.path: known[s.path][2] for s, stat in zip(sources, stats, strict=True) if known.get(s.path, ())[:2] == [*stat]}
    new = [source for source in sources if source.path not in digests]
    if new:
        fresh = digest_files([Path(source.path) for source in new], [source.size for source in new], comm)
        digests |= {source.path: digest for source, digest in zip(new, fresh, strict=True)}
        rows = {source.path: [*stat, digests[source.path]] for source, stat in zip(sources, stats, strict=True)}
        run_on_root(comm, lambda: _write_index(index, rows))
    return stats, [digests[source.path] for source in sources]


def _stat(path: str) -> Stat:
    with touching(path):
        stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _read_index(index: Path) -> dict[str, list]:
    """What is remembered; a damaged index is forgotten."""
    try:
        rows = json.loads(index.read_bytes())
        return {path: [int(size), int(time), str(digest)] for path, (size, time, digest) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_index(index: Path, rows: dict[str, list]) -> None:
    own = with_ending(index, f".{secrets.token_hex(4)}")
    with touching(index, "write"):
        index.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(rows))
        os.replace(own, index)
