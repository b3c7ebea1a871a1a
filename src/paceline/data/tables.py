"""Read the rows of JSON lines, JSON lists, CSV, TSV and Parquet, one at a time, keeping only the columns asked for.

A row that cannot be used comes out as a ``BadRow`` in its place and reading goes on behind it. Where it cannot go on (a
truncated archive, a JSON list broken in the middle) the last ``BadRow`` of the file says so. Rows are numbered as an
editor shows them: by line in JSON lines, CSV (header = line 1) and TSV, by place from 1 in JSON lists and Parquet.
"""

import codecs
import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from paceline.data.read import BadRow, Kind, SourceFile
from paceline.errors import DataError

_BLOCK_BYTES = 1 << 20
_CELL_CHARACTERS = 1 << 26  # a quote that is never closed swallows at most this much

Cells = tuple[str, ...]
_Read = Iterator[tuple[int, Cells | str, str | bytes]]
"""Of each row its number, its cells (or, as a ``str``, why it cannot be used), and how it looks in the file."""


def rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Cells | BadRow]:
    """Yield the cells of ``columns`` for each row of a table; ``DataError`` if its header lacks one of them."""
    row = 0
    try:
        with file.open() as handle:
            for row, cells, raw in _READERS[file.kind](file, handle, tuple(columns)):
                yield BadRow.of(file, row, cells, raw) if isinstance(cells, str) else cells
    except (OSError, EOFError, zlib.error) as error:
        yield BadRow.of(file, row + 1, f"cannot be read from here on: {error}")


def _json_lines(file: SourceFile, handle: BinaryIO, columns: Cells) -> _Read:
    for number, line in enumerate(handle, 1):
        if line.strip():
            yield number, _json_row(line, columns), line


def _json_row(line: bytes, columns: Cells) -> Cells | str:
    try:
        return _fields(json.loads(line.decode("utf-8-sig")), columns)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _fields(value: Any, columns: Cells) -> Cells | str:
    if not isinstance(value, dict):
        return f"JSON of type {type(value).__name__}, expected an object"
    for column in columns:
        if column not in value:
            return f"no field {column!r}; it has {_list(value)}"
        if not isinstance(value[column], str):
            return f"field {column!r} is {type(value[column]).__name__}, expected text"
        if not _encodable(value[column]):
            return f"field {column!r} holds half of a surrogate pair, which is not text"
    return tuple(value[column] for column in columns)


def _json(file: SourceFile, handle: BinaryIO, columns: Cells) -> _Read:
    """A list of objects, decoded as it streams by; anything else is read as JSON lines."""
    text = _Json(handle)
    number, raw = 1, ""
    try:
        if text.peek() != "[":
            handle.seek(0)
            yield from _json_lines(file, handle, columns)
            return
        text.position += 1
        while text.peek() != "]":
            raw = text.buffer[text.position :][:1000]
            value = text.value()
            yield number, _fields(value, columns), raw
            number += 1
            if text.peek() == ",":
                text.position += 1
            elif text.peek() != "]":
                raise ValueError(f"expected ',' or ']', got {text.peek() or 'the end of the file'!r}")
    except UnicodeDecodeError as error:
        yield number, f"not UTF-8 from here on: {error.reason}", ""
    except (ValueError, RecursionError) as error:
        yield number, f"not JSON from here on: {error}", raw


class _Json:
    """A window on a stream of JSON: it holds about one block and one value."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.buffer = ""
        self.position = 0

    def read(self) -> bool:
        """Read as much again as is held, at least a block, and drop what is behind; False at the end."""
        block = self.handle.read(max(_BLOCK_BYTES, len(self.buffer) - self.position))
        self.buffer = self.buffer[self.position :] + self.decoder.decode(block, final=not block)
        self.position = 0
        return bool(block)

    def peek(self) -> str:
        """Skip white space; the next character, or '' at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.read():
                return ""

    def value(self) -> Any:
        """Take the value at the position; ``ValueError`` if it is not JSON."""
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                if not _cut_short(error) or not self.read():
                    raise
                continue
            if end < len(self.buffer) or not self.read():  # a number at the very end may go on in the next block
                self.position = end
                return value


def _cut_short(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend the error: it is at the end of the buffer, or within the last token before it."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("-Infinity\\u0000")


def _csv(file: SourceFile, handle: BinaryIO, columns: Cells) -> _Read:
    """CSV and TSV, with a header, quoted as RFC 4180 says; quoted cells may hold line ends.

    A byte that is not UTF-8 comes in as a lone surrogate, so that only its own row is bad.
    """
    csv.field_size_limit(_CELL_CHARACTERS)  # of the whole process; the standard 131,072 is less than many documents
    with io.TextIOWrapper(handle, "utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _csv_rows(file, _Lines(text), columns)


def _csv_rows(file: SourceFile, lines: "_Lines", columns: Cells) -> _Read:
    reader = csv.reader(lines, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        lines.start_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield lines.first, f"not CSV: {error}", lines.raw
            continue
        if not header:
            header, places = cells, _places(file, columns, cells)
        elif cells:
            yield lines.first, _csv_row(cells, header, places), lines.raw


class _Lines:
    """Lines for the CSV reader; remembers where a row begins and how it looks."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines = lines
        self.number = 0
        self.start_row()

    def start_row(self) -> None:
        self.first = self.number + 1
        self.raw = ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        self.raw += line[: max(0, 1000 - len(self.raw))]
        return line


def _csv_row(cells: list[str], header: list[str], places: list[int]) -> Cells | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, expected {len(header)}"
    wanted = tuple(cells[place] for place in places)
    if any("\0" in cell for cell in wanted):
        return "holds NUL bytes, so it is not text"
    return wanted if all(map(_encodable, wanted)) else "not UTF-8"


def _parquet(file: SourceFile, handle: BinaryIO, columns: Cells) -> _Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(handle)
        _places(file, columns, table.schema_arrow.names)
        for column in columns:
            _expect_text(file, column, table.schema_arrow.field(column).type)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=list(columns), use_threads=False):
            binary = [batch.column(column).cast(pa.large_string()).cast(pa.large_binary()) for column in columns]
            for cells in zip(*(column.to_pylist() for column in binary), strict=True):
                number += 1
                yield number, _parquet_row(cells, columns), b"\t".join(cell or b"null" for cell in cells)
    except pa.ArrowException as error:
        raise OSError(f"not Parquet: {str(error).splitlines()[0]}") from None


def _expect_text(file: SourceFile, column: str, kind: Any) -> None:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(f"{file.name}: column {column!r} is {kind}, expected text; name another with data.field")


def _parquet_row(cells: tuple[bytes | None, ...], columns: Cells) -> Cells | str:
    texts = []
    for cell, column in zip(cells, columns, strict=True):
        if cell is None:
            return f"field {column!r} is null, expected text"
        try:
            texts.append(cell.decode())
        except UnicodeDecodeError as error:
            return f"field {column!r} is not UTF-8 at byte {error.start}"
    return tuple(texts)


def _places(file: SourceFile, columns: Cells, header: Sequence[str]) -> list[int]:
    """Where each column stands in the header."""
    for column in columns:
        if column not in header:
            raise DataError(f"{file.name}: no column {column!r}; it has {_list(header)}. Name one with data.field")
    return [header.index(column) for column in columns]


def _list(names: Any) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "none"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_READERS: dict[Kind, Callable[[SourceFile, BinaryIO, Cells], _Read]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
}
