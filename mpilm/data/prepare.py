"""Text to token files, in parallel over the ranks; the bytes written do not depend on how many there are.

find sources -> each rank encodes a run of work items to a part file -> count -> copy parts into place -> rename
"""

import hashlib
import json
import os
import secrets
import shutil
import struct
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config.schema import DataConfig
from mpilm.data.files import file_errors, write_durably
from mpilm.data.gather import all_gather_rows, digest_files
from mpilm.data.sources import TextSource, describe_folder, find_sources, partition_items, read_batches, sample_text
from mpilm.data.token_files import TokenCounts, TokenMetadata, open_shared, token_dtype, with_ending, write_index
from mpilm.data.tokenizer import QWEN_BPE, Tokenizer, parse_bpe_size, tokenizer_from_spec, train_bpe
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.formatting import ProgressLine, count_noun

ENDINGS = (".tokenizer.json", ".json", ".bin", ".idx")  # in the order in which files get their names: the .idx completes them
# A row for each sequence: is_last is 1 if a document ends with it, source_bytes counts its text in UTF-8, key is a hash of text
# and chunk number. The sum of the keys of a document, modulo 2^64, identifies its text.
SEQUENCE = np.dtype([("tokens", "<i8"), ("is_last", "<i8"), ("source_bytes", "<i8"), ("key", "<i8", 2)])
KINDS = {"L": "letters", "M": "combining marks", "N": "digits", "P": "punctuation", "S": "symbols", "C": "control characters"}
LETTER_NAMES = ("LETTER", "SYLLABLE", "IDEOGRAPH", "CHARACTER")  # in the Unicode names that begin with the script


class TextInput(NamedTuple):
    """The text of a corpus and the tokenizer for it; the same on every rank."""

    sources: Sequence[TextSource]
    settings: DataConfig
    tokenizer: Tokenizer


def broadcast_sources(data: DataConfig, comm: Comm) -> list[TextSource]:
    """Return the sources that rank 0 finds, on every rank. Collective; raises FileError, DataError or ConfigError."""
    return [TextSource(*row) for row in comm.broadcast_json(run_on_root(comm, lambda: find_sources(data.source)))]


def describe_sources(data: DataConfig, comm: Comm) -> list[str]:
    """Return, of each corpus of data.path, which files of a folder were read, as the end of a line. Collective."""
    texts = comm.broadcast_json(run_on_root(comm, lambda: [describe_folder(path) for path in data.path[::2] or ("",)]))
    return [f"; {text}" if text else "" for text in texts]


def resolve_settings(data: DataConfig) -> DataConfig:
    """Return settings with the tokenizer that auto means. Nobody can repair the embedded corpus, so its errors are replaced."""
    tokenizer = "bpe:2048" if data.tokenizer == "auto" else data.tokenizer
    return replace(data, tokenizer=tokenizer, encoding_errors=data.encoding_errors if data.source else "replace")


def open_text(data: DataConfig, comm: Comm, sources: Sequence[TextSource] | None = None, eos: bool = True) -> TextInput:
    """Find the sources unless they are given, and let rank 0 load or train the tokenizer, with an `eos`. Collective."""
    files, settings = sources or broadcast_sources(data, comm), resolve_settings(data)

    def make_tokenizer() -> list:
        spec, size = settings.tokenizer, parse_bpe_size(settings.tokenizer)
        texts, like_qwen = sample_text(files, settings), spec.startswith(QWEN_BPE)
        tokenizer = train_bpe(texts, size, like_qwen) if size else tokenizer_from_spec(spec, eos)
        return [tokenizer.json, tokenizer.eos, spec]

    return TextInput(files, settings, Tokenizer(*comm.broadcast_json(run_on_root(comm, make_tokenizer))))


def encode_text(
    text: TextInput, comm: Comm, path: str | Path, eos: bool, inspect: Callable[[list[str]], None] = lambda texts: None
) -> NDArray:
    """Write the tokens of this rank's part of the text to a file; return SEQUENCE rows, of which each document is a run. An eos
    ends documents if `eos`. `inspect` receives the texts of each batch. Collective; refuses an empty text."""
    tokenizer, dtype = text.tokenizer, token_dtype(text.tokenizer.vocab_size)
    ending = np.array([tokenizer.eos] if eos else [], dtype=np.int32)

    def encode() -> NDArray:
        items, rows = partition_items(text.sources, comm.rank, comm.size), []
        progress = ProgressLine("preparing text", "MB", comm.rank == 0)
        with file_errors(path, "written"), open(path, "wb") as out:
            for batch in read_batches(items, text.settings, lambda done, total: progress(done / 1e6, total / 1e6)):
                texts, tokens = [chunk.text for chunk in batch], []
                for chunk, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    tokens += [ids, ending] if chunk.is_last else [ids]
                    data = chunk.text.encode()
                    key = hashlib.blake2b(data, digest_size=16, salt=chunk.number.to_bytes(16, "little")).digest()
                    rows.append((len(ids) + (chunk.is_last and eos), chunk.is_last, len(data), struct.unpack("<2q", key)))
                out.write(np.concatenate(tokens).astype(dtype).tobytes())
                inspect(texts)
        return np.array(rows, dtype=SEQUENCE)

    sequences = run_on_all_ranks(comm, encode)
    if not any(comm.all_gather_json(int(sequences["tokens"].sum()))):
        raise CollectiveError(DataError(f"{text.settings.source or 'the embedded corpus'}: holds no text"))
    return sequences


def gather_documents(sequences: NDArray, comm: Comm) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """Return the document of each of this rank's sequences, the SEQUENCE sums of all documents, and which are duplicates. A
    document may lie on several ranks. Collective: 48 bytes a document travel to every rank."""
    ended = comm.all_gather_json(int(sequences["is_last"].sum()))
    number = sum(ended[: comm.rank]) + np.cumsum(sequences["is_last"]) - sequences["is_last"]
    first = np.flatnonzero(np.diff(number, prepend=-1))
    mine = np.column_stack([number[first], np.add.reduceat(sequences.view(np.int64).reshape(-1, 5), first)])
    documents = np.zeros((sum(ended), 5), dtype=np.int64)
    for rows in all_gather_rows(comm, mine):
        np.add.at(documents, rows[:, 0], rows[:, 1:])
    is_duplicate = np.ones(len(documents), dtype=bool)
    is_duplicate[np.unique(documents[:, 3:], axis=0, return_index=True)[1]] = False  # the first of equal keys
    return number, documents.view(SEQUENCE)[:, 0], is_duplicate


def prepare_tokens(
    data: DataConfig, output: str | Path, comm: Comm, drop_duplicates: bool = False, eos: bool = True,
    sources: Sequence[TextSource] | None = None,
) -> TokenMetadata:  # fmt: skip
    """Write the text of `data` as PREFIX.bin, .idx, .json and .tokenizer.json, PREFIX being `output`; an eos ends documents if
    `eos`. Memory is bounded. Collective; raises FileError if one exists, ConfigError or DataError, and leaves nothing then."""
    prefix = Path(output).expanduser()
    run_on_root(comm, lambda: _check_absent(prefix))
    text = open_text(data, comm, sources, eos)
    tokenizer, dtype = text.tokenizer, token_dtype(text.tokenizer.vocab_size)
    with temporary_folder(prefix, comm) as folder:
        temporary = folder / prefix.name
        part, tokens = with_ending(temporary, f".part-{comm.rank:05d}"), with_ending(temporary, ".bin")

        def copy_into_place() -> None:
            _copy_selected(part, tokens, sequences["tokens"] * dtype.itemsize, keep, before.tokens * dtype.itemsize)
            ends = before.sequences + 1 + np.flatnonzero(selected["is_last"])
            write_index(with_ending(temporary, ".idx"), dtype, selected["tokens"], ends, before, total)

        sequences = encode_text(text, comm, part, eos)
        keep, dropped = np.ones(len(sequences), bool), 0
        if drop_duplicates:
            document, _, is_duplicate = gather_documents(sequences, comm)
            keep, dropped = ~is_duplicate[document], int(is_duplicate.sum())
        selected = sequences[keep]
        amounts = [len(selected), *(int(selected[name].sum()) for name in ("tokens", "is_last", "source_bytes"))]
        counts = np.array(comm.all_gather_json(amounts), dtype=np.int64)
        before, total = (TokenCounts(*part.sum(axis=0).tolist()) for part in (counts[: comm.rank], counts))
        run_on_all_ranks(comm, copy_into_place)
        digest = digest_files([tokens], [total.tokens * dtype.itemsize], comm)[0]
        metadata = TokenMetadata(
            **total._asdict(), dtype=dtype.name, tokens_digest=digest, tokenizer=tokenizer.name,
            tokenizer_digest=tokenizer.digest, eos=tokenizer.eos, eos_written=eos, dropped_duplicates=dropped,
        )  # fmt: skip
        run_on_root(comm, lambda: _finish_files(temporary, prefix, metadata, tokenizer.json))
    return metadata


def _check_absent(prefix: Path) -> None:
    for path in (with_ending(prefix, ending) for ending in ENDINGS):
        if path.exists():
            raise FileError(f"{path} exists and is not overwritten; remove it or choose another name")


@contextmanager
def temporary_folder(output: Path, comm: Comm) -> Iterator[Path]:
    """Make a folder beside the output that all ranks see, and remove what is left of it at the end. Collective."""
    folder = with_ending(output, f".{comm.broadcast_json(secrets.token_hex(4))}.tmp")
    try:
        run_on_root(comm, file_errors(folder, "created")(lambda: folder.mkdir(parents=True)))
        seen = "seen (rank 0 has just created it; all ranks must share the folder)"
        run_on_all_ranks(comm, file_errors(folder, seen)(folder.stat))
        yield folder
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _copy_selected(part: Path, target: Path, sizes: NDArray, keep: NDArray[np.bool_], offset: int) -> None:
    """Copy the sequences of `sizes` bytes that are kept from a part file into another file, from `offset` on."""
    with open_shared(target) as out, open(part, "rb") as source:
        out.seek(offset)
        for size, is_selected in zip(sizes.tolist(), keep.tolist()):
            if len(data := source.read(size)) < size:
                raise FileError(f"{part}: ends at byte {source.tell()}, inside a sequence; is the disk full?")
            if is_selected:
                out.write(data)


def _finish_files(temporary: Path, prefix: Path, metadata: TokenMetadata, tokenizer_json: str) -> None:
    """Give the files their names, the .idx last; raises FileError if another job was faster."""
    write_durably(with_ending(temporary, ".tokenizer.json"), tokenizer_json.encode())
    write_durably(with_ending(temporary, ".json"), (json.dumps(asdict(metadata), indent=2) + "\n").encode())
    _check_absent(prefix)
    for ending in ENDINGS:
        with file_errors(with_ending(prefix, ending), "written"):
            os.rename(with_ending(temporary, ending), with_ending(prefix, ending))


def collect_statistics(data: DataConfig, comm: Comm) -> dict[str, str]:
    """Encode the text of `data`, duplicates included, and return a table to print; nothing is written. Collective."""
    text = open_text(data, comm)
    characters = np.zeros(sys.maxunicode + 1, dtype=np.int64)  # the number of each

    def count_characters(texts: list[str]) -> None:
        counts = np.bincount(np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4"))
        characters[: len(counts)] += counts

    _, documents, is_duplicate = gather_documents(encode_text(text, comm, os.devnull, True, count_characters), comm)
    lengths, nbytes = documents["tokens"], documents["source_bytes"]
    low, median, p90, p99, high = np.percentile(lengths, [0, 50, 90, 99, 100])
    distribution = {"min": low, "median": median, "mean": lengths.mean(), "90%": p90, "99%": p99, "max": high}
    percent = 100 / nbytes.sum()
    mine = count_scripts({chr(point): int(characters[point]) for point in np.flatnonzero(characters)})
    scripts = sum((Counter(theirs) for theirs in comm.all_gather_json(mine)), Counter())
    return {
        "documents": f"{len(documents):,}",
        "bytes of text": f"{nbytes.sum():,}",
        f"tokens ({text.tokenizer.name})": f"{lengths.sum():,}",
        "bytes per token": f"{nbytes.sum() / lengths.sum():.3f}",
        "exact duplicates": f"{is_duplicate.sum():,} documents, {percent * nbytes[is_duplicate].sum():.2f}% of the bytes",
        **{f"tokens a document, {name}": f"{value:,.1f}" for name, value in distribution.items()},
        **{f"bytes in {script}": f"{percent * count:.3f}%" for script, count in scripts.most_common()},
    }


def count_scripts(characters: Mapping[str, int]) -> Counter[str]:
    """Return the UTF-8 bytes of each script, or other kind of character, in a text with so many of each character."""
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        name, kind = unicodedata.name(character, ""), KINDS.get(unicodedata.category(character)[0], "whitespace")
        kind = f"{'ASCII' if character.isascii() else 'other'} {'whitespace' if character.isspace() else kind}"
        if kind == "other letters" and any(word in name for word in LETTER_NAMES):
            kind = f"{name.split()[0]} letters"  # such as GREEK letters
        kind = "U+FFFD" if character == "\ufffd" else kind
        scripts[kind] += count * len(character.encode())
    return scripts


def prepare_command(data: DataConfig, output: str, stats: bool, drop_duplicates: bool) -> Callable[[Comm], None]:
    """Check a command line and return what the ranks do for it: print statistics, write token files, or both."""
    if output and (not Path(output).name or output.endswith("/") or Path(output).is_dir()):
        raise ConfigError(f"--output {output} is a folder; write a prefix such as {output.rstrip('/')}/tokens")
    if not output and not stats:
        raise ConfigError("name the files to write with --output PREFIX, or ask for --stats")

    def run(comm: Comm) -> None:
        comm = comm.with_options(gpu_aware=False, yield_while_waiting=True)  # ranks wait while rank 0 trains the tokenizer
        if stats:
            table = collect_statistics(data, comm)
            if comm.rank == 0:
                print("\n".join(f"{name:<{max(map(len, table))}}  {value:>16}" for name, value in table.items()), flush=True)
        if output:
            made = prepare_tokens(data, output, comm, drop_duplicates)
            dropped = f", {made.dropped_duplicates:,} duplicates dropped" if made.dropped_duplicates else ""
            written = f"{made.tokens:,} tokens of {made.dtype} in {count_noun(made.documents, 'document')}{dropped}"
            ratio = f"{made.source_bytes / made.tokens:.2f} bytes a token with {made.tokenizer}"
            files = describe_sources(data, comm)[0]
            if comm.rank == 0:
                print(f"{output}.bin: {written}; {ratio}{files}", flush=True)

    return run
