"""The corpus a run reads: tokens mapped into memory, their tokenizer, and a fingerprint that tells corpora apart."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config.schema import DataConfig
from mpilm.data.cache import cached_corpus
from mpilm.data.encode import Progress
from mpilm.data.files import hex_digest
from mpilm.data.gather import digest_files
from mpilm.data.indexed import TokenFile, check_vocabulary, open_tokens, prefix_of, with_ending
from mpilm.data.prepare import Meta, read_meta, silent
from mpilm.data.tokenizer import Tokenizer, bpe_size, named_tokenizer, read_sidecar
from mpilm.errors import ConfigError, DataError, FileError

VERIFIED_BYTES = 2**30  # of tokens that are read once more at every start, to know that they are as they were
SAMPLE_TOKENS = 2**16
COUNTED_AT_ONCE = 1 << 18  # tokens, which bincount makes 64-bit integers of


@dataclass(frozen=True)
class Corpus:
    """Tokens and what they mean. Equal on every rank."""

    tokens: NDArray
    """(tokens,) mapped into memory, of the file's own integer dtype."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of tokens and tokenizer; where the files lie does not matter."""
    documents: int
    source: str
    """What the user calls it, for messages."""
    path: Path
    """The .bin."""
    bytes_per_token: float
    """Bytes of UTF-8 text a token stands for, on average."""

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start to stop; raises DataError naming file and token when one is no id of the tokenizer."""
        tokens = self.tokens[start:stop]
        check_vocabulary(tokens, self.tokenizer.vocab_size, self.path, start)
        return tokens.astype(np.int64)


def open_corpus(data: DataConfig, comm: Comm, eos: bool = True, progress: Progress = silent) -> Corpus:
    """Open prepared tokens as they are; prepare raw text into the cache first, unless it is there. Collective.

    `eos`: whether documents of raw text end with the tokenizer's eos. Raises ConfigError, FileError or DataError on every
    rank, also when a rank sees other files than rank 0.
    """
    prefix = _prepared_prefix(data.source, comm)
    prepared = prefix or cached_corpus(data, comm, eos, progress)
    meta = _meta(prepared, comm)
    file = run_on_all_ranks(comm, lambda: _open(prepared, meta, verify=comm.rank == 0))
    run_on_all_ranks(comm, lambda: _compare(file, meta, comm))
    tokenizer = run_on_all_ranks(comm, lambda: _tokenizer(data.tokenizer if prefix else "auto", prepared, meta))
    tokens_digest = _digest(file, meta, comm)
    return Corpus(
        tokens=file.tokens,
        tokenizer=tokenizer,
        fingerprint=hex_digest(tokens_digest, tokenizer.digest),
        documents=file.documents,
        source=data.source or "the embedded corpus",
        path=file.path,
        bytes_per_token=meta.source_bytes / meta.tokens if meta else run_on_all_ranks(comm, lambda: _measure(file, tokenizer)),
    )


def _digest(file: TokenFile, meta: Meta | None, comm: Comm) -> str:
    """The digest of the tokens, compared with what was written down when they were made unless they are many. Collective."""
    if meta and file.tokens.nbytes > VERIFIED_BYTES:
        return meta.tokens_digest
    found = digest_files([file.path], [file.tokens.nbytes], comm)[0]
    if meta and found != meta.tokens_digest:
        raise CollectiveError(DataError(f"{file.path}: has been altered: it is not what the .json beside it was written for"))
    return found


def open_corpora(data: DataConfig, comm: Comm, progress: Progress = silent) -> list[tuple[Corpus, float]]:
    """Each corpus of data.path and its part of the samples, all with one tokenizer: what the first was made with, or was given.
    Collective; raises as open_corpus, and ConfigError where token files were made with different tokenizers."""
    (first, part), *others = data.corpora()
    corpora = [(open_corpus(first, comm, progress=progress), part)]
    tokenizer = corpora[0][0].tokenizer
    made = data.tokenizer == "auto" or bpe_size(data.tokenizer)
    spec = str(with_ending(corpora[0][0].path.with_suffix(""), ".tokenizer.json")) if made else data.tokenizer
    for other, part in others:
        corpora.append((open_corpus(replace(other, tokenizer=spec), comm, progress=progress), part))
        run_on_all_ranks(comm, lambda: _refuse_other(corpora[-1][0], tokenizer, corpora[0][0]))
    return corpora


def _refuse_other(corpus: Corpus, tokenizer: Tokenizer, first: Corpus) -> None:
    if corpus.tokenizer.digest != tokenizer.digest:
        raise ConfigError(f"{corpus.path} was made with another tokenizer than {first.path}; a model has only one")


def _prepared_prefix(path: str, comm: Comm) -> Path | None:
    """Where prepared tokens lie, as rank 0 sees it: all ranks must go the same way. Collective."""
    found = run_on_root(comm, lambda: prefix_of(path) if path else None)
    known = comm.broadcast_json(str(found) if found else None)
    return Path(known) if known else None


def _meta(prefix: Path, comm: Comm) -> Meta | None:
    """What rank 0 reads beside the tokens. Collective."""
    found = run_on_root(comm, lambda: read_meta(prefix))
    values = comm.broadcast_json(asdict(found) if found else None)
    return Meta(**values) if values else None


def _open(prefix: Path, meta: Meta | None, verify: bool) -> TokenFile:
    index = with_ending(prefix, ".idx")
    if meta and not index.exists():
        raise FileError(f"{index}: is missing on {socket.gethostname()}, although {with_ending(prefix, '.json')} is there")
    file = open_tokens(prefix, verify)
    if meta and (meta.tokens, meta.dtype) != (len(file.tokens), file.tokens.dtype.name):
        raise DataError(
            f"{file.path}: holds {len(file.tokens)} tokens of {file.tokens.dtype.name}, but the .json beside it speaks of "
            f"{meta.tokens} of {meta.dtype}; they do not belong together"
        )
    return file


def _compare(file: TokenFile, meta: Meta | None, comm: Comm) -> None:
    """Every rank must see what rank 0 sees. Collective."""
    theirs = comm.broadcast_json([len(file.tokens), file.tokens.dtype.name, meta.tokens_digest if meta else ""])
    if theirs != [len(file.tokens), file.tokens.dtype.name, meta.tokens_digest if meta else ""]:
        raise FileError(
            f"{file.path}: is another file on {socket.gethostname()} than on rank 0; put it, or the cache (MPILM_CACHE), "
            "in a folder that all ranks share"
        )


def _tokenizer(spec: str, prefix: Path, meta: Meta | None) -> Tokenizer:
    """The one the tokens were made with; raises ConfigError when --data.tokenizer speaks of another, or nothing of any."""
    sidecar = with_ending(prefix, ".tokenizer.json")
    if meta is None:
        if spec == "auto" or bpe_size(spec):
            raise ConfigError(
                f"--data.tokenizer {spec}: {prefix}.bin has no {prefix.name}.json of mpilm.prepare beside it; "
                "name the tokenizer.json that these tokens were made with (or bytes)"
            )
        return named_tokenizer(spec)
    tokenizer = replace(read_sidecar(sidecar, meta.eos), name=meta.tokenizer)
    if tokenizer.digest != meta.tokenizer_digest:
        raise DataError(f"{sidecar}: is not the tokenizer that the tokens beside it were made with")
    same = (
        spec in ("auto", meta.tokenizer)
        if spec == "auto" or bpe_size(spec)
        else named_tokenizer(spec).with_mask().digest == tokenizer.with_mask().digest
    )
    if not same:
        raise ConfigError(
            f"--data.tokenizer {spec}: {prefix}.bin was made with another one ({meta.tokenizer}); "
            "write --data.tokenizer auto (a preset or a file may have set another), or prepare the text again"
        )
    return tokenizer


def _measure(file: TokenFile, tokenizer: Tokenizer) -> float:
    """Bytes per token from an evenly spread sample of the tokens."""
    pieces = 16
    width = min(len(file.tokens), SAMPLE_TOKENS // pieces)
    starts = [(len(file.tokens) - width) * i // (pieces - 1) for i in range(pieces)]
    for start in starts:
        check_vocabulary(file.tokens[start : start + width], tokenizer.vocab_size, file.path, start)
    text = [tokenizer.decode(file.tokens[start : start + width]) for start in starts]
    return sum(len(part.encode()) for part in text) / (pieces * width)


def unigram_loss(corpora: Sequence[tuple[Corpus, int]]) -> float:
    """Cross-entropy, in nats a token, of predicting the held-out tokens, from each corpus's boundary on, by how often each
    occurs before the boundaries.

    What a model that has learnt frequencies and nothing else would reach; add-one smoothed, so that it is finite.
    """
    for corpus, boundary in corpora:
        if not 0 < boundary < len(corpus.tokens):
            raise ValueError(f"boundary {boundary} of {len(corpus.tokens)} tokens")
    train = np.sum([_frequencies(corpus, 0, boundary) for corpus, boundary in corpora], axis=0) + 1
    held_out = np.sum([_frequencies(corpus, boundary, len(corpus.tokens)) for corpus, boundary in corpora], axis=0)
    return float(-(held_out * np.log(train / train.sum())).sum() / held_out.sum())


def _frequencies(corpus: Corpus, start: int, stop: int) -> NDArray[np.float64]:
    """How often each id of the vocabulary occurs, (vocab_size,)."""
    counts = np.zeros(corpus.tokenizer.vocab_size)
    for first in range(start, stop, COUNTED_AT_ONCE):
        counts += np.bincount(corpus.read(first, min(stop, first + COUNTED_AT_ONCE)), minlength=len(counts))
    return counts
