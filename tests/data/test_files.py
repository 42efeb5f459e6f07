"""Reading documents out of files, of every format and compression, and saying what is wrong with one."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.data import files
from cramjax.data.files import Document, cut, file_format, read_jsonl, read_parquet, read_text
from cramjax.errors import DataError

TEXT = "first line, é\r\nsecond — line\n" * 3


def zstd(raw: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(raw, asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_is_read_exactly(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert list(read_text(path, None, 1 << 16)) == [Document(TEXT)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.jsonl{suffix}"
    rows = [{"text": TEXT, "id": 1}, {"text": None}, {"text": "two"}]
    path.write_bytes(COMPRESS[suffix]("\n\n".join(map(json.dumps, rows)).encode()))
    assert [document.text for document in read_jsonl(path, "text", 1 << 16)] == [TEXT, "two"]


def test_parquet_is_read_over_row_groups(tmp_path: Path):
    texts = [f"text {number}" for number in range(500)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": [*texts, None]}), path, row_group_size=70)
    assert [document.text for document in read_parquet(path, "body", 1 << 16)] == texts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", "text"),
        ("a.txt.gz", "text"),
        ("a.json.zst", "jsonl"),
        ("a.jsonl", "jsonl"),
        ("a.parquet", "parquet"),
        ("README", "text"),
    ],
)
def test_format_is_told_from_the_name(name: str, expected: str):
    assert file_format(Path(name)) == expected


@given(st.text(alphabet="ab\n ", max_size=300), st.integers(4, 40))
@settings(deadline=None)
def test_blocks_of_a_cut_text_join_to_the_text(text: str, block: int):
    documents = list(cut(text, block))
    assert "".join(document.text for document in documents) == text
    assert all(0 < len(document.text) <= block for document in documents)
    assert [document.continues for document in documents] == [number > 0 for number in range(len(documents))]


def test_cuts_come_at_line_ends_then_at_spaces():
    assert [document.text for document in cut("one two\nthree four five", 12)] == ["one two\n", "three four ", "five"]
    assert [document.text for document in cut("abcdefgh", 3)] == ["abc", "def", "gh"]


@given(
    st.lists(st.text(alphabet="ab\n|", max_size=40), max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(8, 60),
)
@settings(deadline=None, max_examples=300)
def test_separators_divide_documents_wherever_chunks_end(texts: list[str], lengths: list[int], block: int):
    whole = "<|>".join(texts)
    chunks, start = [], 0
    while start < len(whole):
        chunks.append(whole[start : start + lengths[len(chunks) % len(lengths)]])
        start += len(chunks[-1])
    joined: list[str] = []
    for document in files._split(chunks, "<|>", block):
        joined[len(joined) - document.continues :] = [(joined[-1] if document.continues else "") + document.text]
    assert joined == [part for part in whole.split("<|>") if part]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert list(read_text(path, None, 100)) == [Document("abc")]


def test_characters_split_between_reads_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "READ_BYTES", 5)
    path = tmp_path / "a.txt"
    path.write_text("ééé—😀" * 9, encoding="utf-8")
    assert "".join(document.text for document in read_text(path, None, 4)) == "ééé—😀" * 9


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"abc\x00def", r"a\.txt: binary, not text \(NUL byte at offset 3\)"),
        ("a.txt", "naïve".encode("latin-1"), r"a\.txt: not UTF-8 text .*near byte 2"),
        ("a.txt.gz", b"not compressed", r"a\.txt\.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-12], r"a\.txt\.gz: cannot be read"),
        ("a.txt.xz", lzma.compress(TEXT.encode())[:-12], r"a\.txt\.xz: cannot be read"),
        ("a.txt.bz2", b"not compressed", r"a\.txt\.bz2: cannot be read"),
        ("a.txt.zst", b"not compressed", r"a\.txt\.zst: cannot be read"),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, name: str, raw: bytes, message: str):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(read_text(tmp_path / name, None, 100))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', r"line 2: no column 'text'\. Set data\.text_field to one of: body, id\."),
        ('{"text": 3}', r"line 2: column 'text' holds int, not text"),
        ('["text"]', r"line 2: got a JSON list, expected one object a line"),
        ('{"text": "x"', r"line 2: not JSON"),
    ],
)
def test_json_lines_that_cannot_be_used(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_jsonl(path, "text", 100))


def test_parquet_that_cannot_be_used(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'text'\. Set data\.text_field to one of: body, id\."):
        list(read_parquet(path, "text", 100))
    with pytest.raises(DataError, match="column 'id' holds int"):
        list(read_parquet(path, "id", 100))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        list(read_parquet(path, "text", 100))
