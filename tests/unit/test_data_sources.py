"""Which files a path stands for, where text is cut, and the messages for what cannot be read."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpilm.data.sources as sources
from mpilm.config.schema import DataConfig
from mpilm.data.sources import TextSource, find_sources, partition_items, read_chunks
from mpilm.errors import DataError, FileError


def read(path, config=DataConfig()):  # noqa: B008 - immutable
    return [chunk for item in partition_items(find_sources(str(path))) for chunk in read_chunks(item, config)]


def documents(path, config=DataConfig()):  # noqa: B008
    texts = [""]
    for chunk in read(path, config):
        assert chunk.number == 0 or texts[-1]
        texts[-1] += chunk.text
        texts += [""] * chunk.is_last
    assert texts.pop() == ""
    return texts


def set_block_size(patch, block, window):
    patch.setattr(sources, "BLOCK_BYTES", block)
    patch.setattr(sources, "WINDOW_BYTES", window)


@pytest.fixture
def small_blocks(monkeypatch):
    set_block_size(monkeypatch, 64, 48)


def compress(ending, data):
    if ending == ".gz":
        return gzip.compress(data, mtime=0)
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


def test_find_sources_folder_is_sorted_by_name_and_filtered(tmp_path):
    for name in ("b/z.md", "b/a.txt", "a.py", "c.jsonl", ".hidden.txt", ".git/x.txt", "picture.png", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else '{"text": "j"}' if "json" in name else name)
    assert documents(tmp_path) == ["a.py", "b/a.txt", "b/z.md", "j"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [("README", b"hello", "hello"), ("x.json", b'{"text": "j"}', "j"), ("x.log.gz", gzip.compress(b"hello", mtime=0), "hello")],
)
def test_find_sources_named_file_is_read_whatever_its_suffix(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == [text]


def test_find_sources_without_text_raises(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        find_sources(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no file in this folder holds text"):
        find_sources(str(tmp_path))
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"x\.txt: the file is empty"):
        find_sources(str(tmp_path / "x.txt"))


def test_find_sources_embedded_corpus_is_large_shuffled_and_without_tests():
    found = find_sources("")
    names = [source.path for source in found]
    assert len(found) > 400
    assert sum(source.size for source in found) > 5e6
    assert not any("/test/" in name or "/site-packages/" in name or "/tests/" in name for name in names)
    assert names != sorted(names)
    assert found == find_sources("")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab \n\r\té猫🐈"), min_size=1, max_size=400))
def test_read_chunks_are_the_same_from_file_stream_and_memory(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        set_block_size(patch, 64, 16)
        (folder / "x.txt").write_bytes(text.encode())
        (folder / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
        (folder / "x.jsonl").write_text(json.dumps({"text": text}))
        expected = read(folder / "x.txt")
        assert "".join(chunk.text for chunk in expected) == text
        assert all(len(chunk.text.encode()) <= 64 + 16 for chunk in expected)
        for name in ("x.txt.gz", "x.jsonl"):
            assert read(folder / name) == expected, name


def test_read_chunks_cuts_before_visible_lines(tmp_path, small_blocks):
    (tmp_path / "x.txt").write_text("".join(f"{'  ' * (i % 3)}line {i}\n" for i in range(100)))
    found = read(tmp_path / "x.txt")
    assert len(found) > 10
    assert all(chunk.text[0] != " " and chunk.text.endswith("\n") for chunk in found)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=100), min_size=1, max_size=30))
def test_read_chunks_json_lines_come_once_wherever_parts_end(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("json") / "x.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        set_block_size(patch, 32, 8)
        assert documents(path) == [text for text in texts if text]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_open_source_reads_several_frames(tmp_path, ending):
    lines = [json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(1000)]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(ending, b"".join(lines[:400])) + compress(ending, b"".join(lines[400:])))
    assert documents(path) == [f"document {i}" for i in range(1000)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda data: data + b"rubbish, rubbish, rubbish"])
def test_open_source_cut_or_damaged_raises(tmp_path, ending, damage):
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(damage(compress(ending, bytes(range(32, 127)) * 50)))
    with pytest.raises(DataError, match=rf"x\.txt{ending}: near byte \d+: cannot be uncompressed, the file is cut or damaged"):
        read(path)


def test_read_chunks_parquet_by_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a", None, "b", "", "c"], "n": range(5)}), tmp_path / "x.parquet", row_group_size=2)
    assert len(partition_items(find_sources(str(tmp_path)))) == 3
    assert documents(tmp_path, DataConfig(text_key="body")) == ["a", "b", "c"]
    with pytest.raises(DataError, match='no column "text", but body, n'):
        read(tmp_path)
    with pytest.raises(DataError, match='column "n" holds int64'):
        read(tmp_path, DataConfig(text_key="n"))
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"x\.parquet is not a Parquet file"):
        find_sources(str(tmp_path))


def test_read_chunks_not_utf8_raises_with_place_or_replaces(tmp_path, small_blocks):
    data = b"fine line\n" * 30 + b"na\xefve\n" + b"more\n" * 20
    (tmp_path / "x.txt").write_bytes(data)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(data, mtime=0))
    for name in ("x.txt", "x.txt.gz"):
        with pytest.raises(DataError, match=rf"{name}: line 31, byte 302 .*--data.encoding-errors replace"):
            read(tmp_path / name)
        assert documents(tmp_path / name, DataConfig(encoding_errors="replace")) == [data.decode("utf-8", "replace")]


BAD_LINES = {
    b'{"text": 1': "line 20 is not JSON",
    b"[1]": "line 20 is not a JSON object, but list",
    b'{"body": "x", "n": 1}': 'line 20 has no field "text"; its fields: body, n. .*--data.text-key',
    b'{"text": 5}': 'line 20 holds int, not text, in the field "text"',
    b'{"text": "\\ud800"}': "line 20 .*surrogate.*--data.encoding-errors replace",
    b'{"text": "\xff"}': f"line 20, byte {17 * 18 + 1 + 10} is not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_read_chunks_bad_json_line_raises_with_place(tmp_path, small_blocks, line, ending):
    data = b'{"text": "fine"}\n' * 17 + b"\n" + b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n'
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(ending, data) if ending else data)
    with pytest.raises(DataError, match=BAD_LINES[line]):
        read(path)
    if "UTF-8" in BAD_LINES[line] or "surrogate" in BAD_LINES[line]:
        assert "\ufffd" in documents(path, DataConfig(encoding_errors="replace"))[18]


def test_read_chunks_counts_lines_for_errors_only(tmp_path, small_blocks, monkeypatch):
    """Counting reads the file from its beginning: done for every line, it made 135 MB take an hour."""
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' * 50)
    (tmp_path / "x.txt").write_text("fine\n" * 50)
    monkeypatch.setattr(sources._Place, "__str__", None)
    assert documents(tmp_path) == ["fine"] * 50 + ["fine\n" * 50]


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks=st.integers(1, 8))
def test_partition_items_covers_all_in_order_with_equal_bytes(sizes, ranks):
    files = [TextSource(str(i), "text", "", size, 1) for i, size in enumerate(sizes)]
    shares = [partition_items(files, rank, ranks) for rank in range(ranks)]
    assert [item for share in shares for item in share] == partition_items(files)
    assert max(sum(item.size for item in share) for share in shares) <= sum(sizes) / ranks + max(sizes)


def test_sample_text_is_bounded_and_from_everywhere(tmp_path, small_blocks, monkeypatch):
    (tmp_path / "x.txt").write_text("".join(f"{i:03}\n" for i in range(160)))
    monkeypatch.setattr(sources, "TRAINING_BYTES", 4 * 64)
    found = "".join(sources.sample_text(find_sources(str(tmp_path)), DataConfig()))
    assert len(found) <= 4 * 80
    assert {int(line) // 40 for line in found.split()} == {0, 1, 2, 3}
