"""Preparing and opening a corpus on several ranks: the same bytes, the same errors, and nothing left behind."""

import itertools
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mpilm.data.pieces as pieces
import mpilm.data.place as place
import mpilm.data.sources as sources
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config.schema import DataConfig
from mpilm.data.corpus import open_corpus
from mpilm.data.indexed import with_ending
from mpilm.data.prepare import prepare, survey
from mpilm.data.tokenizer import EOS, bytes_tokenizer, load_tokenizer
from mpilm.errors import ConfigError, DataError, FileError

SIZES = [1, 2, 3, 4]
LONG = "".join(f"{i} green bottles\n" for i in range(60))
TEXTS = {"a.txt": "first\n", "b.txt": LONG, "c.txt": "first\n", "d/e.md": "Straße\n" * 5, "f.txt": LONG, "g.txt": LONG[:-1]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    """Documents of several sequences, so that documents lie across ranks; and a cache of this test's own."""
    for module in (pieces, sources):
        monkeypatch.setattr(module, "BLOCK_BYTES", 128)
    monkeypatch.setattr(pieces, "WINDOW_BYTES", 64)
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    for name, content in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)
    (folder / "h.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("first\n", LONG, "other", "")))
    return DataConfig(path=(str(folder),), tokenizer="bytes")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_folder(tmp_path, name, data, size, **options):
    out = tmp_path / name
    metas = run_ranks(size, lambda comm: prepare(data, out / "x", comm, **options))
    assert all(meta == metas[0] for meta in metas)
    return files(out), metas[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "bpe:70000"])
@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_the_bytes_do_not_depend_on_the_ranks(tmp_path, text, tokenizer, drop_duplicates):
    data = replace(text, tokenizer=tokenizer)
    outcomes = [in_folder(tmp_path, str(size), data, size, drop_duplicates=drop_duplicates) for size in [*SIZES, 40]]
    assert sorted(outcomes[0][0]) == ["x.bin", "x.idx", "x.json", "x.tokenizer.json"]
    assert all(outcome == outcomes[0] for outcome in outcomes)


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


@pytest.mark.parametrize("size", SIZES)
def test_documents_come_out_in_order_each_closed_by_eos(tmp_path, text, size):
    written, meta = in_folder(tmp_path, "o", text, size)
    expected = [*TEXTS.values(), "first\n", LONG, "other"]
    assert documents_of(written) == [[*t.encode(), 256] for t in expected]
    assert meta.source_bytes == sum(len(t.encode()) for t in expected)
    assert meta.documents == 9
    assert meta.sequences > 9
    assert meta.dtype == "uint16"
    assert meta.dropped_duplicates == 0
    assert json.loads(written["x.json"])["tokens"] == meta.tokens == len(written["x.bin"]) // 2


@pytest.mark.parametrize("size", SIZES)
def test_duplicates_are_found_across_ranks_and_formats(tmp_path, text, size):
    written, meta = in_folder(tmp_path, "o", text, size, drop_duplicates=True)
    assert documents_of(written) == [[*t.encode(), 256] for t in ("first\n", LONG, TEXTS["d/e.md"], LONG[:-1], "other")]
    assert meta.dropped_duplicates == 4
    assert meta.documents == 5


@pytest.mark.parametrize("size", [1, 3])
def test_without_eos_the_tokens_are_the_text(tmp_path, text, size):
    data = replace(text, path=(text.source + "/b.txt",))
    written, _ = in_folder(tmp_path, "o", data, size, eos=False)
    assert np.frombuffer(written["x.bin"], "<u2").tolist() == list(LONG.encode())


def test_a_large_vocabulary_is_written_as_int32(tmp_path, text):
    values = json.loads(bytes_tokenizer().json)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 70000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    _, meta = in_folder(tmp_path, "o", replace(text, tokenizer=str(tmp_path)), 2)
    vocab = load_tokenizer(tmp_path).vocab_size
    assert meta.dtype == ("int32" if vocab > 65536 else "uint16")


@pytest.mark.parametrize("size", SIZES)
def test_survey(text, size):
    found = run_ranks(size, lambda comm: survey(text, comm))
    assert all(s == found[0] for s in found)
    expected = [len(t.encode()) for t in (*TEXTS.values(), "first\n", LONG, "other")]
    s = found[0]
    assert (s.documents, s.source_bytes, s.tokens) == (9, sum(expected), sum(expected) + 9)
    assert s.duplicates == 4
    assert s.duplicate_bytes == 2 * 6 + 2 * len(LONG)
    assert s.lengths["max"] == len(LONG) + 1
    assert s.scripts["Latin extended"] == 10
    assert sum(s.scripts.values()) == sum(expected)


@pytest.mark.parametrize("size", SIZES)
def test_an_error_on_one_rank_ends_all_and_leaves_nothing(tmp_path, text, size):
    (Path(text.source) / "h.jsonl").write_text('{"text": "x"}\nnonsense\n')
    seen = []

    def body(comm):
        with pytest.raises(CollectiveError) as caught:
            prepare(text, tmp_path / "o" / "x", comm)
        seen.append(caught.value.error)

    run_ranks(size, body)
    assert len(seen) == size
    assert {type(error) for error in seen} == {DataError}
    assert len({str(error) for error in seen}) == 1
    assert "h.jsonl: line 2: is not JSON" in str(seen[0])
    assert list((tmp_path / "o").iterdir()) == []


def refusal(size, action):
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


@pytest.mark.parametrize("ending", place.ENDINGS)
def test_nothing_is_overwritten(tmp_path, text, ending):
    (tmp_path / f"x{ending}").write_text("precious")
    error = refusal(2, lambda comm: prepare(text, tmp_path / "x", comm))
    assert isinstance(error, FileError)
    assert "is not overwritten" in str(error)
    assert (tmp_path / f"x{ending}").read_text() == "precious"


def test_what_holds_no_text_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    error = refusal(2, lambda comm: prepare(DataConfig(path=(str(tmp_path),)), tmp_path / "o", comm))
    assert isinstance(error, DataError)
    assert "holds no text" in str(error)


@pytest.mark.parametrize("size", SIZES)
def test_raw_text_is_prepared_once(tmp_path, text, size, monkeypatch):
    first = run_ranks(size, lambda comm: open_corpus(text, comm))
    assert len({c.fingerprint for c in first}) == 1
    assert first[0].tokens.tolist() == open_corpus(text, SelfComm()).tokens.tolist()
    monkeypatch.setattr("mpilm.data.cache.prepare", None)
    monkeypatch.setattr("mpilm.data.cache.digest_files", None)  # and its files are not read again either
    again = open_corpus(text, SelfComm())
    assert again.fingerprint == first[0].fingerprint
    assert again.path == first[0].path
    assert again.documents == 9
    assert again.bytes_per_token == pytest.approx(0.99, abs=0.02)
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [again.path.parent.name]


def test_the_fingerprint_is_of_content(tmp_path, text):
    one = open_corpus(text, SelfComm())
    moved = replace(text, path=(str(Path(text.source).rename(tmp_path / "moved")),))
    assert open_corpus(moved, SelfComm()).fingerprint == one.fingerprint
    prepare(moved, tmp_path / "x", SelfComm())
    assert open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),)), SelfComm()).fingerprint == one.fingerprint
    for ending in (".json", ".tokenizer.json"):
        os.remove(tmp_path / f"x{ending}")
    bare = [open_corpus(DataConfig(path=(str(tmp_path / "x"),), tokenizer="bytes"), SelfComm())]
    bare += run_ranks(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.idx"),), tokenizer="bytes"), comm))
    assert {c.fingerprint for c in bare} == {one.fingerprint}
    assert bare[0].documents == 9
    assert open_corpus(replace(moved, tokenizer="bpe:300"), SelfComm()).fingerprint != one.fingerprint
    (tmp_path / "moved" / "a.txt").write_text("FIRST\n")
    assert open_corpus(moved, SelfComm()).fingerprint != one.fingerprint


def test_two_jobs_at_once_end_with_the_same_corpus(text):
    corpora = run_ranks(4, lambda comm: open_corpus(text, SelfComm()))  # four jobs of one rank
    assert len({c.path for c in corpora}) == 1
    assert len({c.fingerprint for c in corpora}) == 1
    assert [path.name for path in corpora[0].path.parents[1].iterdir()] == [corpora[0].path.parent.name]
    assert sorted(path.name for path in corpora[0].path.parent.iterdir()) == [
        "tokens.bin", "tokens.idx", "tokens.json", "tokens.tokenizer.json",
    ]  # fmt: skip


def test_tokenizers_that_disagree_are_refused(tmp_path, text):
    prepare(text, tmp_path / "x", SelfComm())
    open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),), tokenizer="bytes"), SelfComm())
    error = refusal(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),), tokenizer="bpe:300"), comm))
    assert isinstance(error, ConfigError)
    assert "--data.tokenizer bpe:300" in str(error)
    os.remove(tmp_path / "x.json")
    error = refusal(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x.bin"),)), comm))
    assert isinstance(error, ConfigError)
    assert "name the tokenizer.json" in str(error)


def test_a_rank_that_sees_other_files_is_named(tmp_path, text, monkeypatch):
    """As with a cache in a node's own home: rank 1 looks for the files where they are not."""
    see, calls = place._see, iter(range(3))
    monkeypatch.setattr(place, "_see", lambda path: see(with_ending(path, ".elsewhere" if next(calls) == 1 else "")))
    error = refusal(3, lambda comm: open_corpus(text, comm))
    assert isinstance(error, FileError)
    assert os.uname().nodename in str(error)
    assert "all ranks must share the folder" in str(error)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_a_tokens_file_that_lost_its_end_is_refused(tmp_path, text):
    prepare(text, tmp_path / "x", SelfComm())
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(10)
    error = refusal(2, lambda comm: open_corpus(DataConfig(path=(str(tmp_path / "x"),)), comm))
    assert isinstance(error, DataError)
    assert "has 10 bytes" in str(error)


def test_special_tokens_in_text_are_text(tmp_path):
    (tmp_path / "x.txt").write_text(f"a{EOS}b")
    corpus = open_corpus(DataConfig(path=(str(tmp_path / "x.txt"),), tokenizer="bpe:300"), SelfComm())
    assert (corpus.tokens == corpus.tokenizer.eos).sum() == 1
    assert corpus.tokens[-1] == corpus.tokenizer.eos
