"""Text to token files, in parallel over the ranks; the bytes written do not depend on how many there are.

discover -> items -> each rank encodes a run of them to a part file -> counts -> parts copied into place -> renamed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks, run_on_root
from mpilm.config.schema import DataConfig
from mpilm.data.duplicates import compare_documents
from mpilm.data.encode import Progress, Share, encode_share
from mpilm.data.files import hex_digest, touching, write_durably
from mpilm.data.gather import digest_files
from mpilm.data.indexed import prefix_of, token_dtype, with_ending
from mpilm.data.pieces import Reading, pieces_of
from mpilm.data.place import Temporaries, count, give_names, place, refuse_existing, temporaries
from mpilm.data.sources import BLOCK_BYTES, Source, deal, discover, items_of, spread
from mpilm.data.stats import Statistics, by_script, length_distribution
from mpilm.data.tokenizer import Tokenizer, bpe_size, named_tokenizer, train_bpe
from mpilm.errors import ConfigError, DataError

DEFAULT_TOKENIZER = "bpe:2048"
TRAINING_BYTES = 16 * 2**20  # of text that a BPE is trained on; its time and memory grow with it
FORMAT = 1


@dataclass(frozen=True)
class Meta:
    """What PREFIX.json says of the tokens beside it."""

    format: int
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokens_digest: str
    tokenizer: str
    """As it was asked for."""
    tokenizer_digest: str
    eos: int
    eos_written: bool
    """Whether documents end with the eos token."""
    source_bytes: int
    """Bytes of text in UTF-8."""
    dropped_duplicates: int

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tokens and of what they mean, wherever they lie."""
        return hex_digest(self.tokens_digest, self.tokenizer_digest)


def silent(done: int, total: int) -> None:
    """Progress that nobody wants to see."""


def prepare(
    data: DataConfig,
    output: str | Path,
    comm: Comm,
    drop_duplicates: bool = False,
    eos: bool = True,
    progress: Progress = silent,
    sources: Sequence[Source] | None = None,
) -> Meta:
    """Write the text of `data` as PREFIX.bin, .idx, .json and .tokenizer.json, PREFIX being `output`. Collective.

    Every document ends with the tokenizer's eos unless `eos` is False. Memory does not grow with the text. Raises
    FileError when one of the files exists, ConfigError, DataError; on every rank, and nothing is left behind.
    """
    prefix = Path(output).expanduser()
    run_on_root(comm, lambda: refuse_existing(prefix))
    sources = agree_on_sources(data, comm) if sources is None else sources
    reading = reading_of(data)
    tokenizer = agree_on_tokenizer(data, sources, comm)
    dtype = token_dtype(tokenizer.vocab_size)
    with temporaries(prefix, comm) as temporary:
        share = run_on_all_ranks(comm, lambda: _encode(sources, reading, tokenizer, temporary.part, eos, comm, progress))
        documents = compare_documents(share, comm) if drop_duplicates else None
        keep = np.ones(len(share.lengths), bool) if documents is None else ~documents.repeated[documents.number]
        dropped = 0 if documents is None else int(documents.repeated.sum())
        before, total = count(share, keep, comm)
        run_on_all_ranks(comm, lambda: _refuse_empty(total.tokens, data))
        place(temporary, share, keep, dtype, before, total, comm)
        size = total.tokens * dtype.itemsize
        digest = digest_files([temporary.final(".bin")], [size], comm)[0]
        meta = Meta(
            format=FORMAT, documents=total.documents, sequences=total.sequences, tokens=total.tokens, dtype=dtype.name,
            tokens_digest=digest, tokenizer=tokenizer.name, tokenizer_digest=tokenizer.digest, eos=tokenizer.eos,
            eos_written=eos, source_bytes=total.source_bytes, dropped_duplicates=dropped,
        )  # fmt: skip
        run_on_root(comm, lambda: _publish(temporary, meta, tokenizer))
    return meta


def survey(data: DataConfig, comm: Comm, progress: Progress = silent) -> Statistics:
    """What the text of `data` is made of; nothing is written. Collective."""
    sources = agree_on_sources(data, comm)
    tokenizer = agree_on_tokenizer(data, sources, comm)
    mine = deal(items_of(sources), comm.rank, comm.size)
    dtype = token_dtype(tokenizer.vocab_size)

    def encode() -> Share:
        with open(os.devnull, "wb") as nowhere:
            return encode_share(mine, reading_of(data), tokenizer, nowhere, dtype, scripts=True, progress=progress)

    share = run_on_all_ranks(comm, encode)
    documents = compare_documents(share, comm)
    run_on_all_ranks(comm, lambda: _refuse_empty(len(documents.lengths), data))
    return Statistics(
        documents=len(documents.lengths),
        tokens=int(documents.lengths.sum()),
        source_bytes=int(documents.source_bytes.sum()),
        tokenizer=tokenizer.name,
        lengths=length_distribution(documents.lengths),
        duplicates=int(documents.repeated.sum()),
        duplicate_bytes=int(documents.source_bytes[documents.repeated].sum()),
        scripts=by_script(np.sum(comm.all_gather_json(share.scripts.tolist()), axis=0)),
    )


def _refuse_empty(amount: int, data: DataConfig) -> None:
    if not amount:
        raise DataError(f"{data.source or 'the embedded corpus'}: holds no text")


# What all ranks must agree on before they start.


def agree_on_sources(data: DataConfig, comm: Comm) -> list[Source]:
    """Rank 0's view of what the path holds, on every rank. Collective; raises FileError, DataError or ConfigError."""

    def find() -> list[Source]:
        if data.source and prefix_of(data.source):
            raise ConfigError(f"--data.path {data.source}: these are prepared tokens; give the text they were made from")
        return discover(data.source)

    found = run_on_root(comm, find)
    return [Source(*values) for values in comm.broadcast_json([astuple(source) for source in found or []])]


def reading_of(data: DataConfig) -> Reading:
    """How text is taken from files; in the embedded corpus nobody can put a file right."""
    return Reading(data.encoding_errors if data.source else "replace", data.text_key)


def agree_on_tokenizer(data: DataConfig, sources: Sequence[Source], comm: Comm) -> Tokenizer:
    """The tokenizer that --data.tokenizer asks for, loaded or trained by rank 0, on every rank. Collective."""

    def make() -> list:
        spec = DEFAULT_TOKENIZER if data.tokenizer == "auto" else data.tokenizer
        size = bpe_size(spec)
        tokenizer = named_tokenizer(spec) if size is None else train_bpe(_sample(sources, reading_of(data)), size)
        return [tokenizer.json, tokenizer.eos, spec]

    return Tokenizer(*comm.broadcast_json(run_on_root(comm, make)))


def _sample(sources: Sequence[Source], reading: Reading) -> Iterator[str]:
    """Text to train a tokenizer on, evenly spread over the corpus and bounded."""
    items = items_of(sources)
    total = sum(item.size for item in items)
    chosen = spread(items, max(1, len(items) * TRAINING_BYTES // max(TRAINING_BYTES, total)))
    for item in chosen:
        plain = item.source.format != "parquet" and not item.source.codec
        left = 2 * BLOCK_BYTES if plain else TRAINING_BYTES // len(chosen)  # how much the others hold, nobody knows
        for piece in pieces_of(item, reading):
            yield piece.text[:left]
            left -= len(piece.text)
            if left <= 0:
                break


# Encoding to part files.


def _encode(
    sources: Sequence[Source], reading: Reading, tokenizer: Tokenizer, part: Path, eos: bool, comm: Comm, progress: Progress
) -> Share:
    mine = deal(items_of(sources), comm.rank, comm.size)
    with touching(part, "write"), open(part, "wb") as out:
        return encode_share(mine, reading, tokenizer, out, token_dtype(tokenizer.vocab_size), eos, progress=progress)


def _publish(temporary: Temporaries, meta: Meta, tokenizer: Tokenizer) -> None:
    """Give the files their names, the .idx last."""
    write_durably(temporary.final(".tokenizer.json"), tokenizer.json.encode())
    write_durably(temporary.final(".json"), (json.dumps(asdict(meta), indent=2) + "\n").encode())
    give_names(temporary)


def read_meta(prefix: Path) -> Meta | None:
    """What PREFIX.json says; None where there is none, as with Megatron's own files. Raises DataError."""
    path = with_ending(prefix, ".json")
    if not path.exists():
        return None
    with touching(path):
        text = path.read_bytes()
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, and only {FORMAT} is known")
        return Meta(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: is not what mpilm.prepare writes beside its tokens: {error}") from None
