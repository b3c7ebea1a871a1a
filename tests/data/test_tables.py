"""Rows of tables: every row comes out once, as its cells or as the reason why not, and none ends the reading."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data import tables
from paceline.data.read import BadRow, SourceFile, find
from paceline.data.tables import rows
from paceline.errors import DataError

texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), max_size=20)


def read(path: Path, *columns: str) -> list[tuple[str, ...] | tuple[int, str]]:
    """The cells of good rows, and (row, reason) of bad ones."""
    found = rows(find(str(path))[0], columns or ("text",))
    return [(row.row, row.reason) if isinstance(row, BadRow) else row for row in found]


def written(path: Path, content: str | bytes) -> Path:
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


GOOD = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON: Invalid control character"),
        (b"[1]", "JSON of type list, expected an object"),
        (b'"text"', "JSON of type str, expected an object"),
        (b'{"body": "x", "id": 1}', "no field 'text'; it has 'body', 'id'"),
        (b"{}", "no field 'text'; it has none"),
        (b'{"text": 3}', "field 'text' is int, expected text"),
        (b'{"text": null}', "field 'text' is NoneType, expected text"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "field 'text' holds half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz"])
def test_a_bad_json_line_is_told_and_the_next_is_read(tmp_path: Path, name: str, line: bytes, reason: str) -> None:
    path = written(tmp_path / name, GOOD + b"\n" + line + b"\n" + GOOD)
    first, bad, last = read(path)
    assert first == last == ("one",)
    assert bad[0] == 3
    assert str(bad[1]).startswith(reason)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)) == [("one",)] * 2
    assert read(written(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "one"}]')) == [("one",)]
    assert read(written(tmp_path / "a.csv", b"\xef\xbb\xbftext\r\none\r\n")) == [("one",)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.sampled_from([1, 2, 7, 64]), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_a_json_list_gives_its_rows_whatever_the_size_of_blocks(
    cells: list[str], block: int, ascii_only: bool, indent: int | str | None
) -> None:
    whole = json.dumps([{"text": cell, "n": 12345} for cell in cells], ensure_ascii=ascii_only, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK_BYTES", block)
        found = list(rows(SourceFile("a.json", "json", text=whole), ("text",)))
    assert found == [(cell,) for cell in cells]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.integers(0, 300), st.sampled_from([1, 64, 1 << 20]))
def test_a_json_list_that_is_cut_short_keeps_the_rows_before(cells: list[str], length: int, block: int) -> None:
    raw = json.dumps([{"text": cell} for cell in cells], ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK_BYTES", block)
        patch.setattr(SourceFile, "open", lambda _: io.BytesIO(raw[:length]))
        found = list(rows(SourceFile("a.json", "json"), ("text",)))
    good = [row for row in found if isinstance(row, tuple)]
    assert good == [(cell,) for cell in cells[: len(good)]]
    if 0 < length < len(raw):
        assert [type(row) for row in found[len(good) :]] == [BadRow]
    elif length >= len(raw):
        assert len(good) == len(cells)


def test_a_json_list_with_bad_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"text": "a"}, 7, {"text": 1}, {"text": "b"} {"text": "c"}]')
    assert read(path) == [
        ("a",),
        (2, "JSON of type int, expected an object"),
        (3, "field 'text' is int, expected text"),
        ("b",),
        (5, "not JSON from here on: expected ',' or ']', got '{'"),
    ]
    (broken,) = [row for row in rows(find(str(path))[0], ("text",)) if isinstance(row, BadRow) and row.row == 2]
    assert broken.raw.startswith("7, ")


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.json", b"\n" + GOOD * 2)) == [("one",)] * 2
    assert read(written(tmp_path / "b.json", b"")) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.sampled_from(["csv", "tsv"]))
def test_csv_gives_back_what_the_csv_writer_was_given(cells: list[str], kind: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text"])
    writer.writerows([[str(index), cell] for index, cell in enumerate(cells)])
    file = SourceFile("a", kind, text=out.getvalue())  # type: ignore[arg-type]
    assert list(rows(file, ("text",))) == [(cell,) for cell in cells]
    assert list(rows(file, ("text", "id"))) == [(cell, str(index)) for index, cell in enumerate(cells)]


def test_bad_csv_rows_are_told_by_the_line_they_begin_at(tmp_path: Path) -> None:
    content = b'id,text\n1,"two\nlines"\n2\n3,"a"b\n4,\xff\n5,a\0b\n\n6,ok\n7,"never closed\n8,x\n'
    assert read(written(tmp_path / "a.csv", content)) == [
        ("two\nlines",),
        (4, "1 cells, expected 2"),
        (5, "not CSV: ',' expected after '\"'"),
        (6, "not UTF-8"),
        (7, "holds NUL bytes, so it is not text"),
        ("ok",),
        (10, "not CSV: unexpected end of data"),
    ]
    raws = [row.raw for row in rows(find(str(tmp_path / "a.csv"))[0], ("text",)) if isinstance(row, BadRow)]
    assert raws == ["2\n", '3,"a"b\n', "4,\ufffd\n", "5,a\0b\n", '7,"never closed\n8,x\n']


def test_a_long_csv_cell_is_a_document(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert read(written(tmp_path / "a.csv", f"text\n{long}\n")) == [(long,)]


def test_parquet(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")])
    column = pa.chunked_array([pa.array(["one", None, "zwö"]), bad, pa.array([""])])
    pq.write_table(pa.table({"id": range(5), "text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == [
        ("one",),
        (2, "field 'text' is null, expected text"),
        ("zwö",),
        (4, "field 'text' is not UTF-8 at byte 1"),
        ("",),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_other_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("a",), ("b",), ("a",)]


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    for path in (written(tmp_path / "a.csv", "id,body\n1,x\n"), tmp_path / "a.parquet"):
        with pytest.raises(DataError, match=r"no column 'text'; it has 'id', 'body'\. Name one with data.field"):
            read(path)
    with pytest.raises(DataError, match="column 'id' is int64, expected text"):
        read(tmp_path / "a.parquet", "id")


def test_files_that_cannot_be_read_to_the_end(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "x" * 100}).encode() + b"\n" + b'{"text": "y"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = read(tmp_path / "a.jsonl.gz")
    assert found[0] == ("x" * 100,)
    assert str(found[-1][1]).startswith("cannot be read from here on: Compressed file ended")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    assert read(tmp_path / "b.jsonl.gz") == [(1, "cannot be read from here on: Not a gzipped file (b'no')")]
    (tmp_path / "c.parquet").write_bytes(b"not parquet at all")
    ((row, reason),) = read(tmp_path / "c.parquet")
    assert row == 1
    assert "not Parquet" in str(reason)
