"""Megatron's format: against a parser written from its description, and damaged in many ways."""

import json
import struct
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.token_files import (
    TokenCounts,
    TokenMetadata,
    document_starts,
    find_prefix,
    open_tokens,
    read_metadata,
    token_dtype,
    write_index,
)  # fmt: skip
from mpilm.errors import DataError, FileError


def megatron_bytes(documents, code, letter):
    """PREFIX.bin and PREFIX.idx of documents (lists of sequences (lists of tokens)), packed one field at a time."""
    sequences = [sequence for document in documents for sequence in document]
    data = b"".join(struct.pack("<" + letter * len(s), *s) for s in sequences)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents) + 1)
    index += b"".join(struct.pack("<i", len(s)) for s in sequences)
    at = 0
    for sequence in sequences:
        index += struct.pack("<q", at)
        at += struct.calcsize("<" + letter) * len(sequence)
    mark = 0
    index += struct.pack("<q", 0)
    for document in documents:
        mark += len(document)
        index += struct.pack("<q", mark)
    return data, index


def save(folder, data, index):
    (folder / "x.bin").write_bytes(data)
    if index is not None:
        (folder / "x.idx").write_bytes(index)
    return folder / "x"


DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10]]]


@pytest.mark.parametrize(
    ("code", "letter", "dtype"), [(8, "H", "uint16"), (4, "i", "int32"), (5, "q", "int64"), (1, "B", "uint8")]
)
def test_open_tokens_reads_megatron(tmp_path, code, letter, dtype):
    tokens, documents = open_tokens(save(tmp_path, *megatron_bytes(DOCUMENTS, code, letter)))
    assert tokens.tolist() == list(range(1, 11))
    assert tokens.dtype.name == dtype
    assert documents == 3
    assert document_starts(tmp_path / "x.bin").tolist() == [0, 4, 6, 10]


@settings(max_examples=50)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=4), min_size=1, max_size=3), min_size=1, max_size=6),
    cut=st.integers(0, 6),
)
def test_write_index_writes_megatron_in_two_parts(tmp_path_factory, documents, cut):
    path = tmp_path_factory.mktemp("index") / "x.idx"
    counts = [TokenCounts(len(d), sum(map(len, d)), 1, 0) for d in documents]
    total, zero = TokenCounts(*np.sum(counts, axis=0).tolist()), TokenCounts(0, 0, 0, 0)
    for part, first in ((documents[cut:], counts[:cut]), (documents[:cut], [])):
        before = TokenCounts(*np.sum([zero, *first], axis=0).tolist())
        lengths = np.array([len(s) for d in part for s in d], dtype=np.int64)
        ends = before.sequences + np.cumsum([len(d) for d in part], dtype=np.int64)
        write_index(path, np.dtype("uint16"), lengths, ends, before, total)
    assert path.read_bytes() == megatron_bytes(documents, 8, "H")[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": [2]}, "format [2], and only 1 is known"),
        ({"eos": 1e999}, "eos missing, unknown or of another type"),
        ({"tokens": "9", "sequences": True}, "sequences, tokens missing, unknown or of another type"),
        ({"surprise": 1}, "surprise missing, unknown or of another type"),
    ],
)
def test_read_metadata_refuses_what_prepare_does_not_write(tmp_path, change, message):
    written = TokenMetadata(
        documents=1, sequences=1, tokens=1, dtype="uint16", tokens_digest="d", tokenizer="bytes", tokenizer_digest="d", eos=256,
        eos_written=True, source_bytes=1, dropped_duplicates=0,
    )  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(asdict(written)))
    assert read_metadata(tmp_path / "x") == written
    (tmp_path / "x.json").write_text(json.dumps({**asdict(written), **change}))
    with pytest.raises(DataError) as caught:
        read_metadata(tmp_path / "x")
    assert str(caught.value).endswith(f"x.json is not what mpilm.prepare writes beside its tokens: {message}")


def test_open_tokens_reads_nanogpt(tmp_path):
    tokens, documents = open_tokens(save(tmp_path, struct.pack("<3H", 7, 65535, 0), None))
    assert (tokens.tolist(), documents) == ([7, 65535, 0], 1)
    assert document_starts(tmp_path / "x.bin").tolist() == [0, 3]


def patched(index, at, data):
    return index[:at] + data + index[at + len(data) :]


LENGTHS_AT, POINTERS_AT = 34, 34 + 4 * 4
MARKS_AT = POINTERS_AT + 8 * 4
DAMAGE = {
    "magic": (lambda i: patched(i, 0, b"X"), "byte 0: .*MMIDIDX"),
    "header cut": (lambda i: i[:20], "byte 20: .*inside its header"),
    "version": (lambda i: patched(i, 9, b"\x02"), "byte 9: version 2"),
    "dtype unknown": (lambda i: patched(i, 17, b"\x63"), "byte 17: dtype code 99"),
    "dtype float": (lambda i: patched(i, 17, b"\x07"), "byte 17: dtype code 7"),
    "cut": (lambda i: i[:-3], f"byte {MARKS_AT + 29}: has"),
    "too long": (lambda i: i + b"12", f"byte {MARKS_AT + 32}: has"),
    "sequences": (lambda i: patched(i, 18, struct.pack("<Q", 2**60)), "byte 114: has 114 bytes, but .* document marks take"),
    "length": (lambda i: patched(i, LENGTHS_AT + 4, struct.pack("<i", -1)), f"byte {LENGTHS_AT + 4}: sequence 1 has length -1"),
    "pointer": (
        lambda i: patched(i, POINTERS_AT + 8, struct.pack("<q", 2)),
        f"byte {POINTERS_AT + 8}: sequence 1 .* pointer 2",
    ),
    "first mark": (lambda i: patched(i, MARKS_AT, struct.pack("<q", 1)), f"byte {MARKS_AT}: document mark 0 is 1"),
    "falling mark": (lambda i: patched(i, MARKS_AT + 16, struct.pack("<q", 0)), f"byte {MARKS_AT + 16}: document mark 2 is 0"),
    "last mark": (lambda i: patched(i, MARKS_AT + 24, struct.pack("<q", 9)), f"byte {MARKS_AT + 24}: document mark 3 is 9"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_open_tokens_damaged_index_raises_with_byte(tmp_path, damage):
    change, message = DAMAGE[damage]
    data, index = megatron_bytes(DOCUMENTS, 8, "H")
    with pytest.raises(DataError, match=rf"x\.idx: {message}"):
        open_tokens(save(tmp_path, data, change(index)))


@pytest.mark.parametrize("change", [lambda d: d[:-2], lambda d: d + b"\0\0", lambda d: d[:-1]])
def test_open_tokens_bin_of_another_size_raises(tmp_path, change):
    data, index = megatron_bytes(DOCUMENTS, 8, "H")
    with pytest.raises(DataError, match=r"x\.bin: has \d+ bytes, but .*x\.idx describes 20"):
        open_tokens(save(tmp_path, change(data), index), verify=False)


def test_open_tokens_bare_bin_must_hold_whole_tokens(tmp_path):
    with pytest.raises(DataError, match="byte 3: ends in the middle of a token"):
        open_tokens(save(tmp_path, b"123", None))
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(save(tmp_path, b"", None))
    with pytest.raises(FileError, match=r"nowhere\.bin"):
        open_tokens(tmp_path / "nowhere")


def test_token_dtype_holds_the_largest_id():
    assert [token_dtype(size).name for size in (257, 65536, 65537)] == ["uint16", "uint16", "int32"]


def test_find_prefix_knows_token_files(tmp_path):
    prefix = save(tmp_path, *megatron_bytes(DOCUMENTS, 8, "H"))
    assert find_prefix(str(prefix)) == find_prefix(f"{prefix}.bin") == find_prefix(f"{prefix}.idx") == prefix
    (tmp_path / "x.txt").write_text("text")
    assert [find_prefix(path) for path in ("", ".", str(tmp_path / "x.txt"), str(tmp_path))] == [None] * 4
