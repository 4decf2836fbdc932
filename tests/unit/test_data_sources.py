"""From paths to pieces of text: what is taken, where it is cut, and what is said of what cannot be read."""

import gzip
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpilm.data.pieces as pieces
import mpilm.data.sources as sources
from mpilm.data.pieces import Reading, blocks, pieces_of
from mpilm.data.sources import Item, deal, discover, items_of, spread
from mpilm.errors import DataError, FileError


def read(path, reading=Reading()):  # noqa: B008 - frozen
    return [piece for item in items_of(discover(str(path))) for piece in pieces_of(item, reading)]


def documents(path, reading=Reading()):  # noqa: B008
    texts = [""]
    for piece in read(path, reading):
        assert piece.number == 0 or texts[-1]
        texts[-1] += piece.text
        texts += [""] * piece.last
    assert texts.pop() == ""
    return texts


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 64)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    monkeypatch.setattr(pieces, "WINDOW_BYTES", 48)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b/z.md", "b/a.txt", "a.py", "c.jsonl", ".hidden.txt", ".git/x.txt", "picture.png", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else '{"text": "j"}' if "json" in name else name)
    assert documents(tmp_path) == ["a.py", "b/a.txt", "b/z.md", "j"]


def test_what_holds_nothing_is_refused(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        discover(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no file in this folder holds text"):
        discover(str(tmp_path))
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"x\.txt: the file is empty"):
        discover(str(tmp_path / "x.txt"))


def test_a_file_named_by_itself_is_text_whatever_its_suffix(tmp_path):
    (tmp_path / "README").write_text("hello")
    assert documents(tmp_path / "README") == ["hello"]


def test_the_embedded_corpus_is_large_shuffled_and_without_tests():
    found = discover("")
    names = [source.path for source in found]
    assert len(found) > 400
    assert sum(source.size for source in found) > 5e6
    assert not any("/test/" in name or "/site-packages/" in name or "/tests/" in name for name in names)
    assert names != sorted(names)
    assert found == discover("")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab \n\r\té猫🐈"), max_size=400))
def test_blocks_are_the_same_from_a_file_a_stream_and_memory(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("blocks")
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        for module in (pieces, sources):
            patch.setattr(module, "BLOCK_BYTES", 64)
        patch.setattr(pieces, "WINDOW_BYTES", 16)
        streamed = [(block.decode(), last) for block, last in blocks(io.BytesIO(data))]
        assert "".join(block for block, _ in streamed) == text
        if data:
            (folder / "x.txt").write_bytes(data)
            (folder / "x.txt.gz").write_bytes(gzip.compress(data))
            (folder / "x.jsonl").write_text(json.dumps({"text": text}))
            expected = [(block, number, last) for number, (block, last) in enumerate(streamed)]
            for name in ("x.txt", "x.txt.gz", "x.jsonl"):
                assert [(p.text, p.number, p.last) for p in read(folder / name)] == expected, name


def test_blocks_end_where_a_line_begins(tmp_path, small_blocks):
    lines = [f"{'  ' * (i % 3)}line {i}\n" for i in range(100)]
    (tmp_path / "x.txt").write_text("".join(lines))
    found = read(tmp_path / "x.txt")
    assert len(found) > 10
    assert all(piece.text[0] != " " and piece.text.endswith("\n") for piece in found)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=100), min_size=1, max_size=30))
def test_json_lines_come_out_once_each_wherever_the_ranges_end(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("json") / "x.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        for module in (pieces, sources):
            patch.setattr(module, "BLOCK_BYTES", 32)
        patch.setattr(pieces, "WINDOW_BYTES", 8)
        assert documents(path) == [text for text in texts if text]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_several_frames_are_read(tmp_path, ending):
    lines = [json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(1000)]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(ending, b"".join(lines[:400])) + compress(ending, b"".join(lines[400:])))
    assert documents(path) == [f"document {i}" for i in range(1000)]
    (tmp_path / f"y.txt{ending}").write_bytes(compress(ending, b"some text\n" * 9))
    assert documents(tmp_path / f"y.txt{ending}") == ["some text\n" * 9]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_or_damaged_compressed_file_is_refused(tmp_path, ending):
    path = tmp_path / f"x.txt{ending}"
    whole = compress(ending, bytes(range(32, 127)) * 50)
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match="ends too early"):
        read(path)
    path.write_bytes(whole + b"rubbish, rubbish, rubbish")
    with pytest.raises(DataError, match="cannot be uncompressed"):
        read(path)


def compress(ending, data):
    if ending == ".gz":
        return gzip.compress(data)
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


def test_parquet_by_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a", None, "b", "", "c"], "n": range(5)}), tmp_path / "x.parquet", row_group_size=2)
    assert len(items_of(discover(str(tmp_path)))) == 3
    assert documents(tmp_path, Reading(text_key="body")) == ["a", "b", "c"]
    with pytest.raises(DataError, match='no column "text", but body, n'):
        read(tmp_path)
    with pytest.raises(DataError, match='column "n" holds int64'):
        read(tmp_path, Reading(text_key="n"))
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"x\.parquet: is not a Parquet file"):
        discover(str(tmp_path))


def test_text_that_is_not_utf8_is_placed(tmp_path, small_blocks):
    data = b"fine line\n" * 30 + b"na\xefve\n" + b"more\n" * 20
    (tmp_path / "x.txt").write_bytes(data)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(data))
    for name in ("x.txt", "x.txt.gz"):
        with pytest.raises(DataError, match=rf"{name}: line 31, byte 302: .*--data.encoding-errors replace"):
            read(tmp_path / name)
        assert documents(tmp_path / name, Reading("replace")) == [data.decode("utf-8", "replace")]


BAD_LINES = {
    b'{"text": 1': "line 20: is not JSON",
    b"[1]": "line 20: is not a JSON object, but list",
    b'{"body": "x", "n": 1}': 'line 20: has nothing under "text"; its keys are: body, n; .*--data.text-key',
    b'{"text": 5}': 'line 20: has int and no text under "text"',
    b'{"text": "\\ud800"}': "line 20: .*surrogate.*--data.encoding-errors replace",
    b'{"text": "\xff"}': "line 20, byte 332: is not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_json_lines_are_placed(tmp_path, small_blocks, line, ending):
    data = b'{"text": "fine"}\n' * 17 + b"\n" + b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n'
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(ending, data) if ending else data)
    with pytest.raises(DataError, match=BAD_LINES[line].replace("332", str(17 * 18 + 1 + line.find(b"\xff")))):
        read(path)
    if b"text" in line and ("UTF-8" in BAD_LINES[line] or "surrogate" in BAD_LINES[line]):
        assert "\ufffd" in documents(path, Reading("replace"))[18]


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks=st.integers(1, 8))
def test_items_are_dealt_in_runs_that_cover_everything(sizes, ranks):
    source = sources.Source("x", "text", "", 1, 1)
    items = [Item(replace(source, size=size, path=str(i)), 0) for i, size in enumerate(sizes)]
    shares = [deal(items, rank, ranks) for rank in range(ranks)]
    assert [item for share in shares for item in share] == items
    fair = sum(sizes) / ranks
    assert max(sum(item.size for item in share) for share in shares) <= fair + max(sizes)


def test_a_spread_takes_from_everywhere():
    items = [Item(sources.Source(str(i), "text", "", 1, 1), 0) for i in range(100)]
    assert [int(item.source.path) for item in spread(items, 4)] == [0, 25, 50, 75]
    assert spread(items, 200) == items


def test_line_numbers_are_counted_for_errors_only(tmp_path, small_blocks, monkeypatch):
    """Counting reads the file from its beginning: done for every line it made 135 MB take an hour."""
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' * 50)
    (tmp_path / "x.txt").write_text("fine\n" * 50)
    monkeypatch.setattr(pieces, "_line_of", None)
    assert documents(tmp_path) == ["fine"] * 50 + ["fine\n" * 50]
