"""Everything a run reads: corpora or conversations, opened on all ranks, and the examples made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks
from mpilm.config.schema import Config
from mpilm.data.batch import ExampleSource
from mpilm.data.chat import ChatExamples, ChatTemplate, find_chat_template, read_chats
from mpilm.data.corpus import Corpus, open_corpora
from mpilm.data.files import hex_digest
from mpilm.data.objective import make_objective
from mpilm.data.prepare import broadcast_sources, describe_sources
from mpilm.data.samples import CorpusMixture, CorpusSamples, TextExamples
from mpilm.data.tokenizer import Tokenizer, fit_to_model, splits_like_qwen, tokenizer_from_spec
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun
from mpilm.model.hf.config import hf_model_type

EOS_SEARCH_TOKENS = 10**7  # at the beginning of a corpus


@dataclass(frozen=True)
class TrainingData:
    """The data of a run. Equal on every rank."""

    tokenizer: Tokenizer  # of the model: with a mask token if the objective needs one
    examples: ExampleSource
    content: Mapping[str, str]  # digests of what was read, by setting
    template: ChatTemplate | None  # the chat template that goes with the tokenizer
    corpora: Sequence[CorpusSamples]  # of running text
    summary_lines: Sequence[str]  # for the header of the run


def open_training_data(config: Config, comm: Comm) -> TrainingData:
    """Open, or prepare, the data that `config` names. Collective; raises CollectiveError."""
    open_data = _open_chats if config.data.format == "chat" else _open_texts
    return open_data(config, run_on_all_ranks(comm, lambda: find_chat_template(config.data.tokenizer)), comm)


def _open_texts(config: Config, template: ChatTemplate | None, comm: Comm) -> TrainingData:
    data, context_length = config.data, config.model.context_length
    corpora = open_corpora(data, comm, config.model.arch)
    first = corpora[0]
    tokenizer = run_on_all_ranks(comm, lambda: fit_to_model(first.tokenizer, config.model))
    samples = run_on_all_ranks(comm, lambda: [CorpusSamples(corpus, context_length, data.eval_fraction) for corpus in corpora])
    run_on_all_ranks(comm, lambda: _check_have_eos(corpora, data.packing))
    mixture = CorpusMixture(samples, [corpus.part for corpus in corpora]) if len(corpora) > 1 else samples[0]
    examples = TextExamples(mixture, make_objective(config.model, data, tokenizer), data.packing, tokenizer.eos)
    parts = (f"{corpus.fingerprint} {corpus.part!r}" for corpus in corpora)
    fingerprint = hex_digest(*parts) if len(corpora) > 1 else first.fingerprint
    content = {"data.path": fingerprint, "data.tokenizer": first.tokenizer.digest}
    lines, folders = list[str](), describe_sources(data, comm)
    for corpus, of, files in zip(corpora, samples, folders):
        name, share = first.tokenizer.name, "" if corpus.part == 1.0 else f" {corpus.part:.1%} of the samples,"
        lines += [
            f"{corpus.source}: {len(corpus.tokens):,} tokens of {name}, {count_noun(corpus.documents, 'document')},{share}",
            f"{of.eval_samples:,} of {of.eval_samples + of.train_samples:,} sequences held out{files}",
        ]
    return TrainingData(tokenizer, examples, content, template, samples, lines + _describe_split(tokenizer, config))


def _describe_split(tokenizer: Tokenizer, config: Config) -> list[str]:
    if hf_model_type(config.model) != "qwen2" or config.model.init_from or splits_like_qwen(tokenizer):
        return []
    return [
        "for qwen2 models transformers' AutoTokenizer ignores how this tokenizer splits text: load it there with",
        "PreTrainedTokenizerFast, or use another (qwen-bpe:SIZE)",
    ]


def _check_have_eos(corpora: Sequence[Corpus], packing: str) -> None:
    """Raise ConfigError if documents are to be kept apart, which the token that ends them does, and no document has it."""
    for corpus in corpora:
        eos = corpus.tokenizer.eos
        if packing == "documents" and corpus.documents > 1 and not (corpus.tokens[:EOS_SEARCH_TOKENS] == eos).any():
            problem = f"in {corpus.source} no document ends with token {eos}, which ends documents with its tokenizer"
            raise ConfigError(f"--data.packing documents: {problem}; prepare the text again, or write --data.packing concat")


def _open_chats(config: Config, template: ChatTemplate | None, comm: Comm) -> TrainingData:
    data = config.data
    sources = broadcast_sources(data, comm)
    if any(source.format != "jsonl" for source in sources):
        message = f"--data.format chat reads JSON lines, and --data.path {data.source} holds others: name .jsonl files"
        raise CollectiveError(ConfigError(message))
    tokenizer = run_on_all_ranks(comm, lambda: fit_to_model(tokenizer_from_spec(data.tokenizer), config.model))
    chats = read_chats(sources, tokenizer, template, comm, data.max_document_mib)
    examples = run_on_all_ranks(comm, lambda: ChatExamples(chats, config.model.context_length, data, tokenizer.eos))
    content = {"data.path": hex_digest(*(values.tobytes() for values in chats)), "data.tokenizer": tokenizer.digest}
    lines = [
        f"{data.source}: {len(chats.ends):,} conversations, {examples.truncated:,} of them cut at the context and "
        f"{examples.left_out:,} left out,",
        f"{len(chats.tokens):,} tokens of {tokenizer.name}, {examples.targets.sum():,} to be learnt, in "
        f"{len(examples.rows):,} rows, {examples.eval_samples:,} held out{describe_sources(data, comm)[0]}",
    ]
    return TrainingData(tokenizer, examples, content, template, [], lines)
