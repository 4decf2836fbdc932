"""Preparing and opening a corpus on several ranks: the same bytes, the same errors, and nothing left behind."""

import itertools
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from thread_ranks import run_ranks

import mpilm.data.corpus as corpus
import mpilm.data.prepare as prepare
import mpilm.data.sources as sources
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig
from mpilm.data.corpus import open_corpus
from mpilm.data.prepare import collect_statistics, prepare_tokens
from mpilm.data.tokenizer import EOS, bytes_tokenizer, load_tokenizer
from mpilm.errors import ConfigError, DataError, FileError

SIZES = [1, 2, 3, 4]
LONG = "".join(f"{i} green bottles\n" for i in range(60))
TEXTS = {"a.txt": "first\n", "b.txt": LONG, "c.txt": "first\n", "d/e.md": "Straße\n" * 5, "f.txt": LONG, "g.txt": LONG[:-1]}
DOCUMENTS = [*TEXTS.values(), "first\n", LONG, "other"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    """Documents of several sequences, so that documents lie across ranks; and a cache of this test's own."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 128)
    monkeypatch.setattr(sources, "WINDOW_BYTES", 64)
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    for name, content in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)
    (folder / "h.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("first\n", LONG, "other", "")))
    return DataConfig(path=(str(folder),), tokenizer="bytes")


def prepare_files(folder, data, size, **options):
    """The bytes of the files that so many ranks write, and the metadata, which is the same on all."""
    metadata = run_ranks(size, lambda comm: prepare_tokens(data, folder / "x", comm, **options))
    assert all(each == metadata[0] for each in metadata)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, metadata[0]


def collective_error(size, action):
    """The error that every rank raises."""
    errors = []

    def body(comm):
        with pytest.raises(CollectiveError) as caught:
            action(comm)
        errors.append(caught.value.error)

    run_ranks(size, body)
    assert len({(type(error), str(error)) for error in errors}) == 1
    assert len(errors) == size
    return errors[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "bpe:70000"])
@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_prepare_tokens_bytes_do_not_depend_on_ranks(tmp_path, text, tokenizer, drop_duplicates):
    data = replace(text, tokenizer=tokenizer)
    made = [prepare_files(tmp_path / str(n), data, n, drop_duplicates=drop_duplicates) for n in [*SIZES, 40]]
    assert sorted(made[0][0]) == ["x.bin", "x.idx", "x.json", "x.tokenizer.json"]
    assert all(each == made[0] for each in made)


def parse_index(raw):
    """An .idx read one field at a time: dtype code, lengths, pointers, document marks."""
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", raw, 9) == (1,)
    code, n, d = struct.unpack_from("<B", raw, 17)[0], *struct.unpack_from("<QQ", raw, 18)
    return code, *(
        struct.unpack_from(f"<{c}{k}", raw, at) for c, k, at in ((n, "i", 34), (n, "q", 34 + 4 * n), (d, "q", 34 + 12 * n))
    )


def documents_of(written):
    code, lengths, pointers, marks = parse_index(written["x.idx"])
    assert code == 8
    assert list(pointers) == (2 * (np.cumsum(lengths) - lengths)).tolist()
    tokens = np.frombuffer(written["x.bin"], "<u2")
    edges = [0, *np.cumsum(lengths).tolist()]
    return [tokens[edges[a] : edges[b]].tolist() for a, b in itertools.pairwise(marks)]


def test_prepare_tokens_documents_are_in_order_and_end_with_eos(tmp_path, text):
    written, metadata = prepare_files(tmp_path / "o", text, 3)
    assert documents_of(written) == [[*t.encode(), 256] for t in DOCUMENTS]
    assert metadata.source_bytes == sum(len(t.encode()) for t in DOCUMENTS)
    assert metadata.documents == 9 < metadata.sequences
    assert (metadata.dtype, metadata.dropped_duplicates) == ("uint16", 0)
    assert json.loads(written["x.json"])["tokens"] == metadata.tokens == len(written["x.bin"]) // 2


def test_prepare_tokens_drops_duplicates_across_ranks_and_formats(tmp_path, text):
    written, metadata = prepare_files(tmp_path / "o", text, 3, drop_duplicates=True)
    assert documents_of(written) == [[*t.encode(), 256] for t in ("first\n", LONG, TEXTS["d/e.md"], LONG[:-1], "other")]
    assert (metadata.dropped_duplicates, metadata.documents) == (4, 5)


def test_prepare_tokens_without_eos_writes_the_text_alone(tmp_path, text):
    data = replace(text, path=(text.source + "/b.txt",))
    written, _ = prepare_files(tmp_path / "o", data, 3, eos=False)
    assert np.frombuffer(written["x.bin"], "<u2").tolist() == list(LONG.encode())


def test_prepare_tokens_large_vocabulary_is_int32(tmp_path, text):
    values = json.loads(bytes_tokenizer().json)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 70000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    _, metadata = prepare_files(tmp_path / "o", replace(text, tokenizer=str(tmp_path)), 2)
    assert metadata.dtype == ("int32" if load_tokenizer(tmp_path).vocab_size > 65536 else "uint16")


@pytest.mark.parametrize("size", SIZES)
def test_collect_statistics_counts_documents_across_ranks(text, size):
    tables = run_ranks(size, lambda comm: collect_statistics(text, comm))
    assert all(table == tables[0] for table in tables)
    nbytes = sum(len(t.encode()) for t in DOCUMENTS)
    expected = {
        "documents": "9",
        "bytes of text": f"{nbytes:,}",
        "tokens (bytes)": f"{nbytes + 9:,}",
        "exact duplicates": f"4 documents, {100 * (12 + 2 * len(LONG)) / nbytes:.2f}% of the bytes",
        "tokens a document, max": f"{len(LONG) + 1:,.1f}",
        "bytes in LATIN letters": f"{100 * 10 / nbytes:.3f}%",
    }
    assert {name: tables[0][name] for name in expected} == expected


@pytest.mark.parametrize("size", SIZES)
def test_prepare_tokens_error_on_one_rank_ends_all_and_leaves_nothing(tmp_path, text, size):
    (Path(text.source) / "h.jsonl").write_text('{"text": "x"}\nnonsense\n')
    error = collective_error(size, lambda comm: prepare_tokens(text, tmp_path / "o" / "x", comm))
    assert isinstance(error, DataError)
    assert "h.jsonl: line 2 is not JSON" in str(error)
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize("ending", prepare.ENDINGS)
def test_prepare_tokens_overwrites_nothing(tmp_path, text, ending):
    (tmp_path / f"x{ending}").write_text("precious")
    error = collective_error(2, lambda comm: prepare_tokens(text, tmp_path / "x", comm))
    assert isinstance(error, FileError)
    assert "is not overwritten" in str(error)
    assert (tmp_path / f"x{ending}").read_text() == "precious"


@pytest.mark.parametrize(
    "action", [lambda data, out, comm: prepare_tokens(data, out, comm), lambda data, out, comm: collect_statistics(data, comm)]
)
def test_prepare_without_text_raises(tmp_path, action):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    error = collective_error(2, lambda comm: action(DataConfig(path=(str(tmp_path),), tokenizer="bytes"), tmp_path / "o", comm))
    assert isinstance(error, DataError)
    assert "holds no text" in str(error)


@pytest.mark.parametrize("size", SIZES)
def test_open_corpus_prepares_text_once(tmp_path, text, size, monkeypatch):
    first = run_ranks(size, lambda comm: open_corpus(text, comm))
    assert len({c.fingerprint for c in first}) == 1
    assert first[0].tokens.tolist() == open_corpus(text, SelfComm()).tokens.tolist()
    monkeypatch.setattr("mpilm.data.corpus.prepare_tokens", None)
    monkeypatch.setattr("mpilm.data.corpus._write_index", None)  # the text is that of before
    again = open_corpus(text, SelfComm())
    assert again.fingerprint == first[0].fingerprint
    assert again.path == first[0].path
    assert again.documents == 9
    assert again.bytes_per_token == pytest.approx(0.99, abs=0.02)
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [again.path.parent.name]


def test_open_corpus_fingerprint_depends_on_content_alone(tmp_path, text):
    one = open_corpus(text, SelfComm())
    moved = replace(text, path=(str(Path(text.source).rename(tmp_path / "moved")),))
    assert open_corpus(moved, SelfComm()).fingerprint == one.fingerprint
    prepare_tokens(moved, tmp_path / "x", SelfComm())
    assert open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),)), SelfComm()).fingerprint == one.fingerprint
    for ending in (".json", ".tokenizer.json"):
        os.remove(tmp_path / f"x{ending}")
    bare = [open_corpus(DataConfig(path=(str(tmp_path / "x"),), tokenizer="bytes"), SelfComm())]
    bare += run_ranks(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.idx"),), tokenizer="bytes"), comm))
    assert {c.fingerprint for c in bare} == {one.fingerprint}
    assert bare[0].documents == 9
    assert bare[0].bytes_per_token == pytest.approx(one.bytes_per_token, abs=0.2)
    assert open_corpus(replace(moved, tokenizer="bpe:300"), SelfComm()).fingerprint != one.fingerprint
    (tmp_path / "moved" / "a.txt").write_text("FIRST\n")
    assert open_corpus(moved, SelfComm()).fingerprint != one.fingerprint


@pytest.mark.parametrize("verified_bytes", [corpus.VERIFIED_BYTES, 0])
def test_open_corpus_text_changed_in_place_is_read_again(tmp_path, text, verified_bytes, monkeypatch):
    """Size and time stay. Where too much text is read to compare it, the time of the change of the inode tells."""
    monkeypatch.setattr(corpus, "VERIFIED_BYTES", verified_bytes)
    one, file = open_corpus(text, SelfComm()), tmp_path / "text" / "a.txt"
    before = file.stat()
    file.write_text("FIRST\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert open_corpus(text, SelfComm()).fingerprint != one.fingerprint


def test_open_corpus_four_jobs_at_once_share_one_cache_entry(text):
    corpora = run_ranks(4, lambda comm: open_corpus(text, SelfComm()))  # four jobs of one rank
    assert len({(c.path, c.fingerprint) for c in corpora}) == 1
    folder = corpora[0].path.parent
    assert list(folder.parent.iterdir()) == [folder]
    names = ["tokens.bin", "tokens.idx", "tokens.json", "tokens.tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_open_corpus_with_another_tokenizer_raises(tmp_path, text):
    prepare_tokens(text, tmp_path / "x", SelfComm())
    open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),), tokenizer="bytes"), SelfComm())
    error = collective_error(
        2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),), tokenizer="bpe:300"), comm)
    )
    assert isinstance(error, ConfigError)
    assert "--data.tokenizer bpe:300" in str(error)
    os.remove(tmp_path / "x.json")
    error = collective_error(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),)), comm))
    assert isinstance(error, ConfigError)
    assert "name the tokenizer.json" in str(error)


def test_open_corpus_rank_that_sees_other_files_is_named(tmp_path, text, monkeypatch):
    """As with a cache in a node's own home: rank 1 does not find the folder that rank 0 has made."""
    stat, calls = Path.stat, iter(range(100))

    def find_on_other_ranks(path, **options):
        if path.suffix == ".tmp" and next(calls) == 1:
            raise FileNotFoundError(2, "No such file or directory")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", find_on_other_ranks)
    error = collective_error(3, lambda comm: open_corpus(text, comm))
    assert isinstance(error, FileError)
    assert os.uname().nodename in str(error)
    assert "all ranks must share the folder" in str(error)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_open_corpus_cut_tokens_raise(tmp_path, text):
    prepare_tokens(text, tmp_path / "x", SelfComm())
    os.truncate(tmp_path / "x.bin", 10)
    error = collective_error(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x"),)), comm))
    assert isinstance(error, DataError)
    assert "has 10 bytes" in str(error)


def test_open_corpus_special_token_names_in_text_are_text(tmp_path):
    (tmp_path / "x.txt").write_text(f"a{EOS}b")
    corpus = open_corpus(DataConfig(path=(str(tmp_path / "x.txt"),), tokenizer="bpe:300"), SelfComm())
    assert (corpus.tokens == corpus.tokenizer.eos).sum() == 1
    assert corpus.tokens[-1] == corpus.tokenizer.eos
