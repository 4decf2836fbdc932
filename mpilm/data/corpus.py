"""The corpus a run reads: prepared token files, or text that is prepared once into the user's cache.

cache/corpora/KEY/tokens.bin, ...   token files; the key is a digest of everything that they depend on
cache/files/KEY.json                digests of the input files of a path, so that files at rest are read once
"""

import json
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config.schema import QWEN_STYLE, DataConfig
from mpilm.data.files import file_errors, hex_digest, parse_json, read_bytes
from mpilm.data.gather import digest_files
from mpilm.data.prepare import broadcast_sources, prepare_tokens, resolve_settings, temporary_folder
from mpilm.data.sources import TextSource
from mpilm.data.token_files import TokenMetadata, find_prefix, open_tokens, read_metadata, with_ending
from mpilm.data.tokenizer import BPE, Tokenizer, load_tokenizer, parse_bpe_size, tokenizer_from_spec
from mpilm.errors import ConfigError, DataError, FileError, UserError

VERIFIED_BYTES = 2**30  # of tokens, and of text, that are read and compared with their digest at every start
SAMPLED_TOKENS, SAMPLES = 2**16, 16  # to measure bytes per token
COUNTED_TOKENS = 2**18  # at once, which bincount makes 64-bit integers of


@dataclass(frozen=True)
class Corpus:
    """Tokens and their meaning. Equal on every rank."""

    tokens: NDArray  # (tokens,), mapped into memory, of the file's own integer dtype
    tokenizer: Tokenizer
    fingerprint: str  # hex digest of tokens and tokenizer, wherever the files are
    documents: int
    source: str  # what the user calls it, for messages
    path: Path  # of the .bin
    bytes_per_token: float  # bytes of UTF-8 text a token stands for, on average
    part: float = 1.0  # of the samples of a run

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens start to stop; raises DataError naming file and token if one is no id of the tokenizer."""
        tokens, size = self.tokens[start:stop], self.tokenizer.vocab_size
        if tokens.size and (int(tokens.max()) >= size or int(tokens.min()) < 0):
            at = int(np.argmax((tokens >= size) | (tokens < 0)))
            problem = f"the tokenizer's ids end at {size - 1}; these tokens were made with another tokenizer"
            raise DataError(f"{self.path}: token {start + at} is {int(tokens[at])}, but {problem}")
        return tokens.astype(np.int64)


def open_corpus(data: DataConfig, comm: Comm, eos: bool = True, arch: str = "") -> Corpus:
    """Open token files; those of text are prepared in the cache if need be, and end documents with an eos if `eos`. `arch`: the
    model for which a tokenizer is trained. Collective; raises CollectiveError, also if ranks see different files."""
    prepared = comm.broadcast_json(run_on_root(comm, lambda: str(find_prefix(data.source) or "")))
    prefix = Path(prepared) if prepared else prepare_in_cache(_with_family_bpe(data, arch), comm, eos)
    path, source = with_ending(prefix, ".bin"), data.source or "the embedded corpus"
    tokens, documents, metadata = run_on_all_ranks(comm, lambda: _open_files(prefix, verify=comm.rank == 0))
    seen = comm.all_gather_json([socket.gethostname(), len(tokens), tokens.dtype.name, metadata and asdict(metadata)])
    if others := [host for host, *identity in seen if identity != seen[0][1:]]:
        advice = "put it, or the cache (MPILM_CACHE), in a folder that all ranks share"
        raise CollectiveError(FileError(f"{path} is another file on {others[0]} than on rank 0; {advice}"))
    tokenizer = run_on_all_ranks(comm, lambda: _load_tokenizer(data.tokenizer if prepared else "auto", prefix, metadata))
    if not (prepared or parse_bpe_size(data.tokenizer) or data.tokenizer == "auto"):
        tokenizer = replace(tokenizer, name=data.tokenizer)  # the cache may be of another path to the same tokenizer
    trusted = metadata.tokens_digest if metadata and tokens.nbytes > VERIFIED_BYTES else ""
    digest = trusted or digest_files([path], [tokens.nbytes], comm)[0]
    corpus = Corpus(tokens, tokenizer, hex_digest(digest, tokenizer.digest), documents, source, path, 0.0)
    if not metadata:
        return replace(corpus, bytes_per_token=run_on_all_ranks(comm, lambda: _measure_bytes_per_token(corpus)))
    if digest != metadata.tokens_digest:
        hint = "" if prepared else f"; it is a cache: remove {prefix.parent}, and the next start prepares it again"
        raise CollectiveError(DataError(f"{path} is damaged: its digest differs from the one in the .json beside it{hint}"))
    return replace(corpus, bytes_per_token=metadata.source_bytes / metadata.tokens)


def _with_family_bpe(data: DataConfig, arch: str) -> DataConfig:
    """Return the settings of text, where a tokenizer that is trained for a qwen model splits text as Qwen does."""
    spec = resolve_settings(data).tokenizer
    return replace(data, tokenizer=f"qwen-{spec}") if arch in QWEN_STYLE and spec.startswith(BPE) else data


def open_corpora(data: DataConfig, comm: Comm, arch: str = "") -> list[Corpus]:
    """Open each corpus of data.path, all with the tokenizer of the first. Collective."""
    corpora, spec = list[Corpus](), data.tokenizer
    for each, part in data.corpora():
        corpora.append(replace(open_corpus(replace(each, tokenizer=spec), comm, arch=arch), part=part))
        first, corpus = corpora[0], corpora[-1]
        if corpus.tokenizer.digest != first.tokenizer.digest:
            problem = f"{corpus.path} was made with another tokenizer than {first.path}; a model has one"
            raise CollectiveError(ConfigError(problem))
        if spec == "auto" or parse_bpe_size(spec):
            spec = str(with_ending(corpus.path.with_suffix(""), ".tokenizer.json"))
    return corpora


def _open_files(prefix: Path, verify: bool) -> tuple[NDArray, int, TokenMetadata | None]:
    metadata, index = read_metadata(prefix), with_ending(prefix, ".idx")
    if metadata and not index.exists():
        raise FileError(f"{index}: is missing on {socket.gethostname()}, although {with_ending(prefix, '.json')} is there")
    tokens, documents = open_tokens(prefix, verify)
    if metadata and (metadata.tokens, metadata.dtype) != (len(tokens), tokens.dtype.name):
        described = f"the .json beside it describes {metadata.tokens} of {metadata.dtype}; they do not belong together"
        raise DataError(f"{prefix}.bin: holds {len(tokens)} tokens of {tokens.dtype.name}, but {described}")
    return tokens, documents, metadata


def _load_tokenizer(spec: str, prefix: Path, metadata: TokenMetadata | None) -> Tokenizer:
    """Return the tokenizer the tokens were made with; raises ConfigError if the setting is another, or does not name one."""
    named = None if spec == "auto" or parse_bpe_size(spec) else tokenizer_from_spec(spec)
    if metadata is None and named:
        return named
    if metadata is None:
        problem = f"{prefix}.bin has no {prefix.name}.json of mpilm.prepare beside it"
        advice = "name the tokenizer.json that these tokens were made with (or bytes)"
        raise ConfigError(f"--data.tokenizer {spec}: {problem}; {advice}")
    file = with_ending(prefix, ".tokenizer.json")
    tokenizer = replace(load_tokenizer(file, metadata.eos), name=metadata.tokenizer)
    if tokenizer.digest != metadata.tokenizer_digest:
        raise DataError(f"{file}: is not the tokenizer that the tokens beside it were made with")
    is_same = named.with_mask().digest == tokenizer.with_mask().digest if named else spec in ("auto", metadata.tokenizer)
    if not is_same:
        advice = "write --data.tokenizer auto (a preset or a file may have set another), or prepare the text again"
        raise ConfigError(f"--data.tokenizer {spec}: {prefix}.bin was made with another one ({metadata.tokenizer}); {advice}")
    return tokenizer


def _measure_bytes_per_token(corpus: Corpus) -> float:
    """Return bytes per token of a sample that is evenly spread over the tokens."""
    width = min(len(corpus.tokens), SAMPLED_TOKENS // SAMPLES)
    starts = [(len(corpus.tokens) - width) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    text = "".join(corpus.tokenizer.decode(corpus.read(start, start + width)) for start in starts)
    return len(text.encode()) / (SAMPLES * width)


def unigram_loss(corpora: Sequence[tuple[Corpus, int]]) -> float:
    """Return the loss in nats a token of what follows each boundary, by the add-one smoothed token frequencies before it."""
    vocab_size = corpora[0][0].tokenizer.vocab_size
    train, validation = np.ones(vocab_size), np.zeros(vocab_size)
    for corpus, boundary in corpora:
        for first in range(0, len(corpus.tokens), COUNTED_TOKENS):
            before, behind = np.split(corpus.read(first, first + COUNTED_TOKENS), [max(0, boundary - first)])
            train += np.bincount(before, minlength=vocab_size)
            validation += np.bincount(behind, minlength=vocab_size)
    return float(-(validation * np.log(train / train.sum())).sum() / validation.sum())


def cache_folder() -> Path:
    """Return MPILM_CACHE, else XDG_CACHE_HOME/mpilm, else ~/.cache/mpilm."""
    folder = os.environ.get("MPILM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mpilm")
    return Path(folder).expanduser()


def prepare_in_cache(data: DataConfig, comm: Comm, eos: bool) -> Path:
    """Return the prefix of the token files of this text and tokenizer in the cache; prepare them unless they exist. Two jobs
    may do this at once: each prepares in a folder of its own, and the first to finish gives it its name. Collective."""
    sources = broadcast_sources(data, comm)
    stats, digests = _digest_sources(data.source, sources, comm)
    folder = Path(comm.broadcast_json(run_on_root(comm, lambda: str(_corpus_folder(data, sources, digests, eos)))))
    if not comm.broadcast_json((folder / "tokens.idx").is_file()):
        with temporary_folder(folder, comm) as own:
            prepare_tokens(data, own / "tokens", comm, eos=eos, sources=sources)
            run_on_root(comm, lambda: _rename_folder(own, folder, sources, stats))
    return folder / "tokens"


def _corpus_folder(data: DataConfig, sources: Sequence[TextSource], digests: Sequence[str], eos: bool) -> Path:
    """Return the folder whose name is a digest of everything that the tokens depend on."""
    settings = resolve_settings(data)
    size = parse_bpe_size(settings.tokenizer)
    kind, _, _ = settings.tokenizer.partition(":")
    tokenizer = f"{kind}:{size}" if size else tokenizer_from_spec(settings.tokenizer, eos).digest
    options = {"encoding_errors": settings.encoding_errors, "text_key": settings.text_key}
    content = [[source.format, source.codec, digest] for source, digest in zip(sources, digests, strict=True)]
    return cache_folder() / "corpora" / hex_digest(json.dumps([TokenMetadata.format, content, tokenizer, options, eos]))[:32]


def _rename_folder(own: Path, folder: Path, sources: Sequence[TextSource], stats: Sequence[list[int]]) -> None:
    for source, stat in zip(sources, stats, strict=True):
        if _stat(source.path) != stat:
            raise DataError(f"{source.path}: was changed while it was read; start again when nobody writes to it")
    try:
        os.rename(own, folder)
    except OSError:
        if not (folder / "tokens.idx").is_file():  # else another job was faster, and has written the same
            with file_errors(folder, "written"):
                raise


def _digest_sources(path: str, sources: Sequence[TextSource], comm: Comm) -> tuple[list[list[int]], list[str]]:
    """Return stat and digest of every source; of more than VERIFIED_BYTES, only those with a new stat are read. Collective."""
    key = hex_digest(str(Path(path).expanduser().resolve()) if path else "")
    index = cache_folder() / "files" / f"{key[:32]}.json"  # of rank 0
    on_root = run_on_root(comm, lambda: [[_stat(source.path) for source in sources], _read_index(index)])
    stats, known = comm.broadcast_json(on_root)
    trusted = known if sum(source.size for source in sources) > VERIFIED_BYTES else {}
    digests = {s.path: trusted[s.path][-1] for s, stat in zip(sources, stats) if trusted.get(s.path, [])[:-1] == stat}
    if changed := [source for source in sources if source.path not in digests]:
        new = digest_files([Path(source.path) for source in changed], [source.size for source in changed], comm)
        digests |= {source.path: digest for source, digest in zip(changed, new)}
        rows = {s.path: [*stat, digests[s.path]] for s, stat in zip(sources, stats)}
        if rows != known:
            run_on_root(comm, lambda: _write_index(index, rows))
    return stats, [digests[source.path] for source in sources]


def _stat(path: str) -> list[int]:
    """Return size in bytes and both times of change in nanoseconds: the second one cannot be set to an earlier time."""
    stat = file_errors(path)(os.stat)(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_index(index: Path) -> dict[str, list]:
    """Return what is stored; nothing if the file is damaged."""
    try:
        rows = parse_json(read_bytes(index), index)
        return {path: [*map(int, stat), str(digest)] for path, (*stat, digest) in rows.items()}
    except (UserError, ValueError, TypeError, AttributeError, OverflowError):
        return {}


def _write_index(index: Path, rows: dict[str, list]) -> None:
    own = with_ending(index, f".{secrets.token_hex(4)}")
    with file_errors(index, "written"):
        index.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(rows))
        os.replace(own, index)
