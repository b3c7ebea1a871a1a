"""Cut files into documents, one at a time, in an order that depends on the files alone.

What one document is (``data.document``):

    file        a whole text file
    paragraph   what stands between blank lines
    line        a line
    row         the text of one row of a table; for pairs, the texts of two columns
    auto        row in tables, file elsewhere

``paragraph`` and ``line`` cut the text of a table's row too. With ``data.split: sentence`` each document is then cut
into its sentences, which are documents of their own from there on, but are held out or trained on together.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from paceline.data.read import BadRow, SourceFile
from paceline.data.tables import rows
from paceline.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """A document as text: one text, or for pairs two."""

    texts: tuple[str, ...]
    file: int
    """Index of its file in the source."""
    key: int
    """64-bit hash of the first text, as it was before sentences were cut: who has the same key is held out together."""
    label: int = 0
    """63-bit hash of what its row says of where it belongs, if that was asked for."""
    opens: bool = True
    """False for the second and later sentences of a document."""

    @property
    def empty(self) -> bool:
        """Whether one of its texts is nothing but white space."""
        return any(not text or text.isspace() for text in self.texts)


def check(
    files: Sequence[SourceFile], document: str, split: str, columns: Sequence[str], label: str | None = None
) -> None:
    """Raise ``DataError`` if the files cannot be cut as asked."""
    for file in files:
        table = file.kind != "text"
        if label is not None and not table:
            raise DataError(
                f"data.clients.label={label}: {file.name} is text and has no columns; use file or source, or a table"
            )
        if document == "row" and not table:
            raise DataError(f"data.document=row: {file.name} is text and has no rows; use file, paragraph or line")
        if document == "file" and table:
            raise DataError(
                f"data.document=file: {file.name} is a table; use row, or paragraph or line within each row"
            )
        if len(columns) > 1 and not table:
            raise DataError(f"{file.name} is text, expected a table with the columns {' and '.join(columns)}")
    if len(columns) > 1 and (document not in ("auto", "row") or split == "sentence"):
        raise DataError(f"data.document={document}, data.split={split}: pairs of texts are not cut; use row and sample")


def documents(
    files: Sequence[SourceFile], columns: Sequence[str], document: str, split: str, label: str | None = None
) -> Iterator[Document | BadRow]:
    """Yield every document, empty ones too, and in its place every row that is none. ``label``: a further column."""
    wanted = columns if label is None else (*columns, label)
    for index, file in enumerate(files):
        for item in _texts(file, wanted, document, len(columns)):
            if isinstance(item, BadRow):
                yield item
                continue
            texts, belongs = item[: len(columns)], item[len(columns) :]
            whole = Document(texts, index, _key(texts[0]), _key(belongs[0]) >> 1 if belongs else 0)
            if split == "sentence" and not whole.empty:
                for place, sentence in enumerate(sentences(texts[0])):
                    yield replace(whole, texts=(sentence,), opens=place == 0)
            else:
                yield whole


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _texts(file: SourceFile, columns: Sequence[str], document: str, texts: int) -> Iterator[tuple[str, ...] | BadRow]:
    """The cells of each document, of which the first ``texts`` are its texts."""
    if file.kind == "text":
        try:
            with file.open() as handle:
                for place, (number, raw) in enumerate(_pieces(handle, document)):
                    yield _text(file, number, raw, "utf-8" if place else "utf-8-sig")
        except (OSError, EOFError) as error:
            yield BadRow.of(file, 0, f"cannot be read: {error}")
        return
    for cells in rows(file, columns):
        if isinstance(cells, BadRow) or document in ("auto", "row"):
            yield cells
        else:
            yield from ((raw.decode(), *cells[texts:]) for _, raw in _pieces(io.BytesIO(cells[0].encode()), document))


def _text(file: SourceFile, number: int, raw: bytes, codec: str) -> tuple[str] | BadRow:
    if b"\0" in raw:
        return BadRow.of(file, number, f"holds a NUL byte at {raw.index(0)}, so it is not text", raw)
    try:
        return (raw.decode(codec),)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})"
        return BadRow.of(file, number, reason, raw)


def _pieces(handle: BinaryIO, document: str) -> Iterator[tuple[int, bytes]]:
    """What becomes a document each, and the number of its first line (0 for all)."""
    if document == "line":
        yield from ((number, line.rstrip(b"\r\n")) for number, line in enumerate(handle, 1))
    elif document == "paragraph":
        yield from _paragraphs(handle)
    else:
        yield 0, handle.read()


def _paragraphs(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines between blank lines, with the number of the first of them."""
    lines: list[bytes] = []
    number = 0
    for number, line in enumerate(handle, 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield number - len(lines), b"".join(lines).rstrip(b"\r\n")
            lines = []
    if lines:
        yield number - len(lines) + 1, b"".join(lines).rstrip(b"\r\n")


_SENTENCE_END = re.compile(
    r"""
      [.!?\u2026] ["'\u201d\u2019\u00bb)\]]* (?= \s+ [^\sa-z] )  # a mark, closing quotes, space, no small letter
    | [\u3002\uff01\uff1f] ["'\u201d\u2019\u300d\u300f\uff09]*   # ideographic marks, which no space follows
    | (?= \n [^\S\n]* \n )                                     # a blank line
    """,
    re.VERBOSE,
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space around them.

    A sentence ends at a full stop, exclamation or question mark or ellipsis before white space that no small ASCII
    letter follows, at the ideographic forms of these, and at a blank line. Abbreviations before a capital ("Dr. Who")
    are cut too.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    parts = (text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    return [part for part in parts if part]
