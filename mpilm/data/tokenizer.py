"""Text to token ids and back: a thin, frozen cover of Hugging Face's tokenizers, and the three ways to come by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.files import hex_digest, read_object, touching
from mpilm.errors import ConfigError, DataError, FileError, UserError

Ids = NDArray[np.int32]

EOS = "<|endoftext|>"
MASK = "[MASK]"
MASK_NAMES = (MASK, "<mask>")
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")
SMALLEST_BPE = 257  # the 256 bytes and the end of a document
LARGEST_BPE = 1_000_000
BYTES_NAME = "bytes"


@dataclass(frozen=True)
class Tokenizer:
    """Byte- or subword-level tokens; text is only ever text, "<|endoftext|>" in a document becomes no special token; but for
    conversations that a chat template has written out."""

    json: str = field(repr=False)
    """The text of its tokenizer.json, which any Hugging Face library reads."""
    eos: int
    """The token that ends a document."""
    name: str = field(compare=False)
    """How messages call it; no part of what it is."""

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, whether or not every id below it is used."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """Hex digest of what the tokenizer does and of where it ends documents."""
        return hex_digest(self.json, str(self.eos))

    @cached_property
    def mask(self) -> int | None:
        """The token that hides another one, if there is one."""
        return next((found for name in MASK_NAMES if (found := self._library.token_to_id(name)) is not None), None)

    def with_mask(self) -> Tokenizer:
        """The same tokenizer, with a mask token of its own after all others where it had none."""
        if self.mask is not None:
            return self
        library = _parse(self.json.encode(), Path(self.name))
        library.add_special_tokens([MASK])
        return Tokenizer(library.to_str(), self.eos, self.name)

    def word_starts(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where words begin among some tokens: wherever letters or digits of one token do not go on in the next."""
        begins, ends = self._word_edges
        starts = np.ones(len(tokens), dtype=bool)
        starts[1:] = ~(begins[tokens[1:]] & ends[tokens[:-1]])
        return starts

    @cached_property
    def _word_edges(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each id, whether it begins inside a word if the one before ends in one, and whether it ends in one."""
        begins, ends = np.zeros((2, self.vocab_size), dtype=bool)
        vocabulary = self._library.get_vocab(with_added_tokens=False)
        pieces = any(token.startswith("##") for token in vocabulary)  # of WordPiece, which marks what goes on
        letters = {c for byte, c in enumerate(_byte_characters()) if byte >= 128 or chr(byte).isalnum()}
        for token, i in vocabulary.items():
            begins[i] = token.startswith("##") if pieces else token[:1] in letters
            ends[i] = pieces or token[-1:] in letters
        return begins, ends

    def encode(self, text: str) -> Ids:
        """The ids of one text, with nothing added."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of one text in which the names of special tokens stand for those tokens, as in a chat template; and the
        character that each begins with."""
        encoded = self._marked.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.int32), np.array([start for start, _ in encoded.offsets], dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, with nothing added."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens by their names; what is not UTF-8 shows as U+FFFD."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _is_bytes(self) -> bool:
        return self.json == bytes_tokenizer().json

    @cached_property
    def _marked(self) -> Any:
        from tokenizers import Tokenizer as Library

        return Library.from_str(self.json)

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self.json)
        library.encode_special_tokens = True  # encode them like any other text
        return library


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document; written as a byte-level BPE without merges."""
    from tokenizers import models

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    library = _byte_level(models.BPE(vocab=vocab, merges=[]))
    library.add_special_tokens([EOS])
    return Tokenizer(library.to_str(), 256, BYTES_NAME)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens with the merges that `texts` ask for; the same texts give the same one."""
    from tokenizers import models, trainers

    library = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS], initial_alphabet=_byte_characters(), show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library.to_str(), library.token_to_id(EOS), f"bpe:{size}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or the folder that holds one; raises FileError or DataError with the file named."""
    file = Path(path).expanduser()
    if file.is_dir():
        if not (file / "tokenizer.json").is_file():
            raise FileError(f"{file}: this folder holds no tokenizer.json")
        file = file / "tokenizer.json"
    with touching(file):
        text = file.read_bytes()
    library = _parse(text, file)
    return Tokenizer(library.to_str(), _find_eos(library, file), str(path))


def read_sidecar(file: Path, eos: int) -> Tokenizer:
    """The tokenizer.json beside prepared tokens, whose metadata says which id ends a document."""
    with touching(file):
        text = file.read_bytes()
    return Tokenizer(_parse(text, file).to_str(), eos, str(file))


def _parse(text: bytes, file: Path) -> Any:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(text.decode())
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{file}: is not a tokenizer.json that the tokenizers library reads: {error}") from None
    library.no_truncation()  # BERT's files, for example, say "cut at 512 tokens"
    library.no_padding()
    return library


def _find_eos(library: Any, file: Path) -> int:
    stated = _stated_eos(file.parent / "tokenizer_config.json")
    for name in (*stated, *EOS_NAMES):
        found = library.token_to_id(name)
        if found is not None:
            return found
    raise DataError(
        f"{file}: no token that ends a document: looked for {', '.join(EOS_NAMES)}, "
        'and for "eos_token" in a tokenizer_config.json beside it'
    )


def _stated_eos(file: Path) -> list[str]:
    """What a tokenizer_config.json calls its end of text, if there is one."""
    if not file.is_file():
        return []
    values = read_object(file)
    stated = values.get("eos_token") or values.get("sep_token")
    name = stated.get("content") if isinstance(stated, dict) else stated
    return [name] if isinstance(name, str) else []


def bpe_size(spec: str) -> int | None:
    """The size that `bpe:SIZE` asks for; None where the spec is no bpe; raises ConfigError where the size cannot be."""
    if not spec.startswith("bpe:"):
        return None
    digits = spec.removeprefix("bpe:")
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        raise ConfigError(
            f"--data.tokenizer {spec}: write bpe:SIZE with a SIZE from {SMALLEST_BPE} to {LARGEST_BPE}, for example bpe:4096"
        )
    return size


def named_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that needs no training: `bytes` or a path; raises ConfigError naming --data.tokenizer."""
    if spec == BYTES_NAME:
        return bytes_tokenizer()
    if not Path(spec).expanduser().exists():
        raise ConfigError(
            f"--data.tokenizer {spec}: no such file or folder; write bytes, bpe:SIZE (for example bpe:2048) "
            "or the path of a tokenizer.json"
        )
    try:
        return load_tokenizer(spec)
    except UserError as error:
        raise type(error)(f"--data.tokenizer: {error}") from None
