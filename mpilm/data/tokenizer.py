"""Text to token ids and back: a frozen wrapper of Hugging Face's tokenizers, and the three ways to get one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mpilm.config.schema import ModelConfig
from mpilm.data.files import MAX_JSON_BYTES, hex_digest, is_valid_utf8, parse_json, read_bytes, read_json
from mpilm.errors import ConfigError, DataError, FileError, UserError

TokenIds = NDArray[np.int32]
EOS, MASK, NO_EOS = "<|endoftext|>", "[MASK]", -1
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")
MASK_NAMES = (MASK, "<mask>")
BPE, QWEN_BPE = "bpe:", "qwen-bpe:"
# The words of Qwen's tokenizer. transformers splits text for a qwen2 model in this way, and ignores the tokenizer.json.
QWEN_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LARGEST_ID = 10_000_000
SMALLEST_BPE, LARGEST_BPE = 257, 1_000_000  # the 256 bytes and the end of a document; more than anyone uses


@dataclass(frozen=True)
class Tokenizer:
    """Byte- or subword-level tokens. A name such as "<|endoftext|>" in a text is encoded as text, not as that token."""

    json: str = field(repr=False)  # the text of its tokenizer.json, which any Hugging Face library reads
    eos: int  # the token that ends a document, or NO_EOS
    name: str = field(compare=False)  # for messages

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, whether or not every id below it is used."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """Hex digest of what the tokenizer does and of the token that ends documents."""
        return hex_digest(self.json, str(self.eos))

    @cached_property
    def mask(self) -> int | None:
        """The mask token, if there is one."""
        return next((token for name in MASK_NAMES if (token := self._library.token_to_id(name)) is not None), None)

    def with_mask(self) -> Tokenizer:
        """Return the same tokenizer, with a mask token of the next free id if it has none."""
        if self.mask is not None:
            return self
        library = _parse(self.json.encode(), self.name)
        library.add_special_tokens([MASK])
        return Tokenizer(library.to_str(), self.eos, self.name)

    def word_starts(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which tokens begin a word: all but those whose letters or digits continue the token before."""
        continues, is_open = self._word_edges
        return ~(continues[tokens] & np.append(False, is_open[tokens[:-1]]))

    @cached_property
    def _word_edges(self) -> NDArray[np.bool_]:
        """For each id whether it can continue a word, and whether the next token can continue it; (2, vocab_size)."""
        edges = np.zeros((2, self.vocab_size), dtype=bool)
        vocabulary = self._library.get_vocab(with_added_tokens=False)
        is_wordpiece = any(token.startswith("##") for token in vocabulary)  # ## marks what continues a word
        letters = {c for byte, c in enumerate(_byte_characters()) if byte >= 128 or chr(byte).isalnum()}
        for token, i in vocabulary.items():
            edges[:, i] = (token.startswith("##"), True) if is_wordpiece else (token[:1] in letters, token[-1:] in letters)
        return edges

    def encode(self, text: str) -> TokenIds:
        """Return the ids of one text, with nothing added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the ids of each text, with nothing added."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def encode_rendered(self, text: str) -> tuple[TokenIds, NDArray[np.int64]]:
        """Return the ids of a text in which the names of special tokens stand for them, and where each token begins."""
        encoded = self._rendered_library.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.int32), np.array([start for start, _ in encoded.offsets], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids: special tokens by their names, U+FFFD for what is not UTF-8."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _is_bytes(self) -> bool:
        return self.json == bytes_tokenizer().json

    @cached_property
    def _rendered_library(self) -> Any:
        return tokenizers.Tokenizer.from_str(self.json)

    @cached_property
    def _library(self) -> Any:
        library = tokenizers.Tokenizer.from_str(self.json)
        library.encode_special_tokens = True  # encode their names like any other text
        return library


def bytes_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0 to 255 are the bytes of UTF-8; 256 ends a document. It is a BPE without merges."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    library = _byte_level(models.BPE(vocab=vocab, merges=[]))
    library.add_special_tokens([EOS])
    return Tokenizer(library.to_str(), 256, "bytes")


def train_bpe(texts: Iterable[str], size: int, like_qwen: bool = False) -> Tokenizer:
    """Train a byte-level BPE of at most `size` tokens, split as by GPT-2 or Qwen. Equal texts give equal tokenizers."""
    library, alphabet = _byte_level(models.BPE(), like_qwen), _byte_characters()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library.to_str(), library.token_to_id(EOS), f"{QWEN_BPE if like_qwen else BPE}{size}")


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_level(model: Any, like_qwen: bool = False) -> Any:
    library, to_bytes = tokenizers.Tokenizer(model), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not like_qwen)
    library.pre_tokenizer, library.decoder = to_bytes, decoders.ByteLevel()
    if like_qwen:
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_WORD), "isolated"), to_bytes])
    return library


def splits_like_qwen(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer splits text as transformers does for a qwen2 model, whatever its tokenizer.json says."""
    texts = tokenizer.json, _byte_level(models.BPE(), like_qwen=True).to_str()
    ours, qwen = (parse_json(text, tokenizer.name) for text in texts)
    return all(ours[part] == qwen[part] for part in ("normalizer", "pre_tokenizer"))


def load_tokenizer(path: str | Path, eos: int | None = None, needs_eos: bool = True) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder, with `eos` or what the files name; with NO_EOS only unless `needs_eos`."""
    location = Path(path).expanduser()
    file = location / "tokenizer.json" if location.is_dir() else location
    if location.is_dir() and not file.is_file():
        raise FileError(f"{location}: this folder holds no tokenizer.json")
    library = _parse(read_bytes(file, MAX_JSON_BYTES), file)
    with _library_errors(file):
        tokenizer = Tokenizer(library.to_str(), _find_eos(library, file, needs_eos) if eos is None else eos, str(path))
        assert tokenizer.vocab_size  # parses what the library has written, which may fail
    return tokenizer


def _parse(text: bytes, file: object) -> Any:
    numbers = [0]  # all integers: the library takes memory for every id below the largest
    parse_json(text, file, parse_int=lambda digits: numbers.append(int(digits)))
    if max(numbers) >= LARGEST_ID:
        raise DataError(f"{file} holds an id or number of {max(numbers):,}; those below {LARGEST_ID:,} are supported")
    with _library_errors(file):
        library = tokenizers.Tokenizer.from_str(text.decode())
        library.no_truncation()  # BERT's files, for example, ask for 512 tokens at most
        library.no_padding()
        return library


@contextmanager
def _library_errors(file: object) -> Iterator[None]:
    """Turn the errors of the tokenizers library, which raises Exception itself or panics, into a DataError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise DataError(f"{file}: is not a tokenizer.json that the tokenizers library reads: {error}") from None


def _find_eos(library: Any, file: Path, needs_eos: bool) -> int:
    config = file.parent / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    named = values.get("eos_token") or values.get("sep_token")
    named = named.get("content") if isinstance(named, dict) else named
    for name in (named, *EOS_NAMES):
        if isinstance(name, str) and is_valid_utf8(name) and (token := library.token_to_id(name)) is not None:
            return token
    if not needs_eos:
        return NO_EOS
    names = f'{", ".join(EOS_NAMES)}, and for "eos_token" in a tokenizer_config.json beside it'
    raise DataError(f"{file}: no token that ends a document: looked for {names}")


def parse_bpe_size(spec: str) -> int | None:
    """Return SIZE of `bpe:SIZE` or `qwen-bpe:SIZE`, None for another spec; raises ConfigError for a size that cannot be."""
    if not spec.startswith((BPE, QWEN_BPE)):
        return None
    kind, _, digits = spec.partition(":")
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        sizes = f"a SIZE from {SMALLEST_BPE} to {LARGEST_BPE}, for example {kind}:4096"
        raise ConfigError(f"--data.tokenizer {spec}: write {kind}:SIZE with {sizes}")
    return size


def tokenizer_from_spec(spec: str, needs_eos: bool = True) -> Tokenizer:
    """Return the tokenizer of a setting that needs no training: `bytes` or a path; raises ConfigError naming the setting."""
    if spec == "bytes":
        return bytes_tokenizer()
    if not Path(spec).expanduser().exists():
        what = "write bytes, bpe:SIZE (for example bpe:2048) or the path of a tokenizer.json"
        raise ConfigError(f"--data.tokenizer {spec}: no such file or folder; {what}")
    try:
        return load_tokenizer(spec, needs_eos=needs_eos)
    except UserError as error:
        raise type(error)(f"--data.tokenizer: {error}") from None


def fit_to_model(tokenizer: Tokenizer, model: ModelConfig) -> Tokenizer:
    """Return the tokenizer, with a mask token for a bert model; raises ConfigError if the embedding has too few rows for it."""
    fitted = tokenizer.with_mask() if model.arch == "bert" else tokenizer
    rows, last = model.vocab_size, fitted.vocab_size - 1
    if 0 < rows <= last:
        owner = f"{model.init_from} has" if model.init_from else f"--model.vocab-size {rows} makes"
        mask = "" if fitted is tokenizer else f"has no {MASK} token, which a bert model needs, and with one "
        raise ConfigError(f"--data.tokenizer {tokenizer.name} {mask}has ids up to {last}, but {owner} {rows} rows for them")
    return fitted
