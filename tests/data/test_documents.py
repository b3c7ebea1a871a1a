"""Documents: what each mode cuts, what is refused, and that no text is lost on the way."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.documents import Document, check, documents, sentences
from paceline.data.read import BadRow, SourceFile, find
from paceline.errors import DataError

plain = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"))


def cut(
    *contents: str,
    document: str = "auto",
    split: str = "sample",
    columns: Sequence[str] = ("text",),
    kind: str = "text",
) -> list[Document | BadRow]:
    files = [SourceFile(f"f{index}", kind, text=content) for index, content in enumerate(contents)]  # type: ignore[arg-type]
    return list(documents(files, columns, document, split))


def texts(items: Sequence[Document | BadRow]) -> list[str]:
    return [item.texts[0] if isinstance(item, Document) else f"bad row {item.row}" for item in items]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plain)
def test_a_file_is_one_document_with_every_character_it_has(content: str) -> None:
    assert texts(cut(content)) == texts(cut(content, document="file")) == [content]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.text("ab \r\f\u2028é", max_size=8)))
def test_a_line_ends_at_a_line_feed_only(lines: list[str]) -> None:
    expected = [line.rstrip("\r") for line in lines]
    assert texts(cut("".join(f"{line}\n" for line in lines), document="line")) == expected


def test_paragraphs_stand_between_blank_lines() -> None:
    content = "\n one\ntwo \n \t\n\nthree\r\n\r\nfour"
    assert texts(cut(content, document="paragraph")) == [" one\ntwo ", "three", "four"]
    assert cut("\n\n", document="paragraph") == []


def test_rows_can_be_cut_further() -> None:
    content = '{"text": "a\\n\\nb\\nc"}\n7\n{"text": "d\\u0000"}\n'
    assert texts(cut(content, kind="jsonl")) == texts(cut(content, kind="jsonl", document="row"))
    assert texts(cut(content, kind="jsonl")) == ["a\n\nb\nc", "bad row 2", "d\0"]
    assert texts(cut(content, kind="jsonl", document="paragraph")) == ["a", "b\nc", "bad row 2", "d\0"]
    assert texts(cut(content, kind="jsonl", document="line")) == ["a", "", "b", "c", "bad row 2", "d\0"]


def test_pairs_are_documents_of_two_texts() -> None:
    content = "de,en\nHallo,Hello\nWelt,\n"
    first, second = cut(content, kind="csv", columns=("de", "en"))
    assert isinstance(first, Document)
    assert first.texts == ("Hallo", "Hello")
    assert not first.empty
    assert isinstance(second, Document)
    assert second.empty


def test_documents_know_their_file_and_equal_texts_have_equal_keys() -> None:
    items = [item for item in cut("a\nb\n", "a\n", document="line") if isinstance(item, Document)]
    assert [item.file for item in items] == [0, 0, 1]
    assert items[0].key == items[2].key != items[1].key


def test_sentences_keep_the_key_of_their_document() -> None:
    (whole,) = cut("One. Two!")
    parts = cut("One. Two!", split="sentence")
    assert texts(parts) == ["One.", "Two!"]
    assert isinstance(whole, Document)
    assert [(part.key, part.opens) for part in parts if isinstance(part, Document)] == [
        (whole.key, True),
        (whole.key, False),
    ]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"good \xff", "is not UTF-8 text (byte 5 is 0xff)"),
        (b"PK\0\1", "holds a NUL byte at 2, so it is not text"),
        ("wide".encode("utf-16"), "holds a NUL byte at 3, so it is not text"),
    ],
)
def test_binary_data_is_a_bad_row(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext")
    bad, good = documents(find(str(tmp_path)), ("text",), "auto", "sample")
    assert isinstance(bad, BadRow)
    assert (bad.row, bad.reason) == (0, reason)
    assert str(bad) == f"{tmp_path / 'a.txt'} {reason}"
    assert texts([good]) == ["text"]


def test_one_bad_line_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xfftwo\nth\0ree\nfour")
    assert texts(list(documents(find(str(tmp_path)), ("text",), "line", "sample"))) == [
        "one",
        "bad row 2",
        "bad row 3",
        "four",
    ]


def test_a_file_that_went_away_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    files = find(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    (bad,) = documents(files, ("text",), "auto", "sample")
    assert isinstance(bad, BadRow)
    assert "cannot be read" in bad.reason


@pytest.mark.parametrize(
    ("name", "document", "split", "columns", "message"),
    [
        ("a.txt", "row", "sample", ("text",), "is text and has no rows; use file, paragraph or line"),
        ("a.csv", "file", "sample", ("text",), "is a table; use row"),
        ("a.txt", "auto", "sample", ("de", "en"), "is text, expected a table with the columns de and en"),
        ("a.csv", "line", "sample", ("de", "en"), "pairs of texts are not cut; use row and sample"),
        ("a.csv", "auto", "sentence", ("de", "en"), "pairs of texts are not cut; use row and sample"),
    ],
)
def test_ways_to_cut_that_do_not_fit_the_files_are_refused(
    name: str, document: str, split: str, columns: tuple[str, ...], message: str
) -> None:
    kind = "text" if name.endswith(".txt") else "csv"
    with pytest.raises(DataError, match=message):
        check([SourceFile(name, kind)], document, split, columns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.14, e.g. here. Then? “Yes!” she said.", ["It is 3.14, e.g. here.", "Then?", "“Yes!” she said."]),
        ('He left. "Why?" Nobody (none) knew.', ["He left.", '"Why?"', "Nobody (none) knew."]),
        ("Title\n\nText goes\non. End", ["Title", "Text goes\non.", "End"]),
        ("你好。再见。", ["你好。", "再见。"]),
        ("  no end  ", ["no end"]),
        ("   ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("aB.!? \n\"')。1"), max_size=60))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
