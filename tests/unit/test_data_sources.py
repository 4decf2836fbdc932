"""Which files a path stands for, where text is cut, and the messages for what cannot be read."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpilm.data.sources as sources
from mpilm.config.schema import DataConfig
from mpilm.data.sources import TextSource, describe_folder, find_sources, partition_items, read_chunks
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


def test_describe_folder_counts_what_is_read_and_what_is_passed_over(tmp_path):
    for name in ("a.py", "b.py", "c.json", "d.csv", "e.pdf", "f.txt", "g.txt.gz", "empty.txt", "README", ".hidden.txt"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else compress(".gz", b"x") if "gz" in name else b"x")
    read, passed_over = describe_folder(str(tmp_path)).split("), ")
    assert len(find_sources(str(tmp_path))) == 5
    assert read.startswith("5 files read (2 .py, ")
    assert {"1 .csv", "1 .txt", "1 .txt.gz"} <= set(read.partition("(")[2].split(", "))
    assert passed_over.startswith("4 files passed over (")
    assert set(passed_over.partition("(")[2][:-1].split(", ")) == {"1 .json", "1 .pdf", "1 .txt", "1 without ending"}
    assert describe_folder(str(tmp_path / "a.py")) == describe_folder("") == ""


def test_guide_lists_the_endings_that_are_read_in_a_folder():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text()
    rows = re.findall(r"^\| (?:text|JSON lines|Parquet)[^|]*\| (.*) \|$", page, re.M)
    assert sorted(re.findall(r"`\.(\w+)`", " ".join(rows))) == sorted(sources.FORMATS)


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


@settings(max_examples=200)
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


@settings(max_examples=50)
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


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_read_chunks_too_long_a_line_raises_with_its_place(tmp_path, ending):
    lines = [b'{"text": "' + b"a" * size + b'"}\n' for size in (9, 2**20 - 50, 3 * 2**20, 9)]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(ending, b"".join(lines)) if ending else b"".join(lines))
    with pytest.raises(DataError, match=r"line 3 is longer than the 1 MiB of --data\.max-document-mib; if it is meant, raise"):
        read(path, DataConfig(max_document_mib=1))
    assert [len(text) for text in documents(path, DataConfig(max_document_mib=4))] == [9, 2**20 - 50, 3 * 2**20, 9]
    for item in partition_items(find_sources(str(path)))[1:3]:  # each part refuses it by itself, wherever the line begins
        with pytest.raises(DataError, match="line 3 is longer"):
            list(read_chunks(item, DataConfig(max_document_mib=1)))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_open_source_that_expands_too_far_raises(tmp_path, monkeypatch, ending, name):
    monkeypatch.setattr(sources, "FREE_EXPANSION_BYTES", 2**21)
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(compress(ending, (b" " * 65535 + b"\n") * 2**5))
    assert "".join(documents(path)).strip() == ""
    path.write_bytes(compress(ending, (b" " * 65535 + b"\n") * 2**8))
    message = rf"{path}: near byte \d+: the stream expands to more than 200 times its size; if that is meant, store it without"
    with pytest.raises(DataError, match=message):
        read(path)


def test_read_chunks_parquet_of_a_damaged_page_raises(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path, text = tmp_path / "x.parquet", "".join(chr(97 + i % 26) for i in range(5000))
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": [text] * 3}), path, **options)
    data = path.read_bytes()
    at = data.index(text.encode())
    for byte in range(at, at + 5000, 500):
        path.write_bytes(data[:byte] + bytes([data[byte] ^ 4]) + data[byte + 1 :])
        with pytest.raises(DataError, match=r"x\.parquet: row group 0 is not Parquet that can be read.*CRC"):
            read(path)
    path.write_bytes(data)
    assert documents(path) == [text] * 3
    with pytest.raises(DataError, match=r"row group 0, row 0 is longer than the 0 MiB"):
        read(path, DataConfig(max_document_mib=0))


def test_read_chunks_parquet_that_lacks_rows_raises(tmp_path, monkeypatch):
    """A flipped bit in the footer can hide the values of a row group from pyarrow."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, *arguments, **options: iter(()))
    with pytest.raises(DataError, match=r"row group 0 is not Parquet that can be read.* has 0 rows, and .* lists 2"):
        read(tmp_path / "x.parquet")


def test_read_chunks_parquet_that_expands_too_far_raises(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setattr(sources, "FREE_EXPANSION_BYTES", 2**21)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 50, pa.int32()), pa.array(["a" * 2**18]))
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet", store_schema=False, dictionary_pagesize_limit=2**20)
    with pytest.raises(DataError, match=r"row group 0, row \d+ expands to more than 200 times its size; .*without compression"):
        read(tmp_path / "x.parquet")


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
    with pytest.raises(DataError, match=r"x\.parquet is not Parquet that can be read"):
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
