"""What a run reads: corpora or conversations, and the stream of examples that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config import Config, Model
from mpilm.data.chat import Conversations, read_conversations, refuse_nothing
from mpilm.data.corpus import Corpus, open_corpora
from mpilm.data.encode import Progress
from mpilm.data.files import hex_digest
from mpilm.data.objective import objective_of
from mpilm.data.prepare import agree_on_sources
from mpilm.data.samples import CorpusSamples, Mixture
from mpilm.data.stream import Stream, TextStream
from mpilm.data.template import Template, find_template
from mpilm.data.tokenizer import Tokenizer, named_tokenizer
from mpilm.errors import ConfigError

LOOKED_AT = 10**7  # tokens


@dataclass(frozen=True)
class Material:
    """`tokenizer`: of the model, with a mask where it needs one. `content`: digests, by setting. `template`: the chat template
    that goes with the tokenizer. `corpora`: of running text. `said`: what the header tells of it."""

    tokenizer: Tokenizer
    stream: Stream
    content: Mapping[str, str]
    template: Template | None
    corpora: Sequence[CorpusSamples]
    said: Sequence[str]


def open_material(config: Config, comm: Comm, progress: Progress) -> Material:
    """Read, or prepare, what `config` names. Collective; raises AgreedError."""
    template = run_on_all_ranks(comm, lambda: _template(config.data.tokenizer))
    return _conversations(config, template, comm) if config.data.format == "chat" else _texts(config, template, comm, progress)


def _texts(config: Config, template: Template | None, comm: Comm, progress: Progress) -> Material:
    data = config.data
    opened = open_corpora(data, comm, progress=progress)
    tokenizer = run_on_all_ranks(comm, lambda: _fitting(config, opened[0][0].tokenizer))
    corpora = run_on_all_ranks(comm, lambda: [
        CorpusSamples(corpus, config.model.context_length, data.eval_fraction) for corpus, _ in opened
    ])  # fmt: skip
    run_on_all_ranks(comm, lambda: _refuse_endless([corpus for corpus, _ in opened], data.packing))
    objective = objective_of(config.model, data, tokenizer)
    samples = Mixture(corpora, [part for _, part in opened]) if len(corpora) > 1 else corpora[0]
    stream = TextStream(samples, objective, data.packing, tokenizer.eos)
    said = [line for (_, part), of in zip(opened, corpora) for line in _of_corpus(of, opened[0][0].tokenizer.name, part)]
    content = {"data.path": _fingerprint(opened), "data.tokenizer": opened[0][0].tokenizer.digest}
    return Material(tokenizer, stream, content, template, corpora, said)


def _refuse_endless(corpora: Sequence[Corpus], packing: str) -> None:
    """Documents are told apart by the token that ends them."""
    for corpus in corpora:
        ends = (corpus.tokens[:LOOKED_AT] == corpus.tokenizer.eos).any()
        if packing == "documents" and corpus.documents > 1 and not ends:
            raise ConfigError(
                f"--data.packing documents: in {corpus.source} no document ends with token {corpus.tokenizer.eos}, which ends "
                "documents with its tokenizer; prepare the text again, or write --data.packing concat"
            )


def _fingerprint(opened: Sequence[tuple[Corpus, float]]) -> str:
    first = opened[0][0].fingerprint
    return first if len(opened) == 1 else hex_digest(*(f"{corpus.fingerprint} {part!r}" for corpus, part in opened))


def _of_corpus(samples: CorpusSamples, tokenizer: str, part: float) -> list[str]:
    corpus, share = samples.corpus, "" if part == 1.0 else f" {part:.1%} of the samples,"
    documents = f"{corpus.documents:,} document{'s' * (corpus.documents != 1)}"
    return [
        f"{corpus.source}: {len(corpus.tokens):,} tokens of {tokenizer}, {documents},{share}",
        f"{samples.eval_samples:,} of {samples.eval_samples + samples.train_samples:,} sequences held out",
    ]


def _conversations(config: Config, template: Template | None, comm: Comm) -> Material:
    data = config.data
    sources = agree_on_sources(data, comm)
    run_on_all_ranks(comm, lambda: _refuse_other_files(data.source, [source.format for source in sources]))
    tokenizer = run_on_all_ranks(comm, lambda: _fitting(config, named_tokenizer(data.tokenizer)))
    tokens, answer, ends = read_conversations(sources, tokenizer, template, comm)
    stream = Conversations(
        tokens, answer, ends, config.model.context_length, data.eval_fraction, tokenizer.eos, data.too_long, data.packing
    )
    run_on_all_ranks(comm, lambda: refuse_nothing(stream, data))
    counts = stream.counts
    said = [
        f"{data.source}: {counts.conversations:,} conversations, {counts.cut:,} of them cut at the context and "
        f"{counts.left_out:,} left out,",
        f"{counts.tokens:,} tokens of {tokenizer.name}, {counts.targets:,} to be learnt, in {counts.rows:,} rows, "
        f"{stream.eval_samples:,} held out",
    ]
    content = {"data.path": hex_digest(tokens.tobytes(), answer.tobytes(), ends.tobytes()), "data.tokenizer": tokenizer.digest}
    return Material(tokenizer, stream, content, template, [], said)


def _refuse_other_files(source: str, formats: Sequence[str]) -> None:
    if any(kind != "jsonl" for kind in formats):
        raise ConfigError(f"--data.format chat reads JSON lines, and --data.path {source} holds others: name .jsonl files")


def _template(tokenizer: str) -> Template | None:
    return find_template(tokenizer) if Path(tokenizer).expanduser().exists() else None


def _fitting(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of the model; raises ConfigError where the model has no rows for all its ids."""
    tokenizer = tokenizer.with_mask() if config.model.arch == "bert" else tokenizer
    refuse_more_ids(tokenizer, config.model)
    return tokenizer


def refuse_more_ids(tokenizer: Tokenizer, model: Model) -> None:
    """Raise ConfigError where the embedding has fewer rows than the tokenizer has ids."""
    rows = model.vocab_size
    if rows and tokenizer.vocab_size > rows:
        whose = f"{model.init_from} has" if model.init_from else f"--model.vocab-size {rows} makes"
        raise ConfigError(
            f"--data.tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, but {whose} {rows} rows for them"
        )
