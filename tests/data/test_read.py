"""Which files a source names, and what is said where it names none."""

import gzip
from pathlib import Path

import pytest

from paceline.data.read import BadRow, SourceFile, find, kind_of, looks_like_hub_name
from paceline.errors import DataError


def names(source: str | Path, root: Path) -> list[str]:
    return [str(file.path.relative_to(root)) for file in find(str(source)) if file.path]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.md", "a/deep/x.jsonl", "a.txt", ".hidden.txt", ".git/y.txt", "picture.png", "c.csv.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_directory_gives_its_known_files_in_the_order_of_their_paths(tree: Path) -> None:
    assert names(tree, tree) == ["a/deep/x.jsonl", "a/z.md", "a.txt", "b.txt", "c.csv.gz"]


def test_globs(tree: Path) -> None:
    assert names(tree / "*.txt", tree) == ["a.txt", "b.txt"]
    assert names(tree / "**", tree) == ["a/deep/x.jsonl", "a/z.md", "a.txt", "b.txt", "c.csv.gz"]
    assert names(tree / "**" / "*.md", tree) == ["a/z.md"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("x")
    assert names(tmp_path / "part[1].txt", tmp_path) == ["part[1].txt"]


def test_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names("~/a/*.md", tree) == names("~/a/z.md", tree) == ["a/z.md"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("A.TXT", "text"),
        ("a.py", "text"),
        ("a.tar.txt.gz", "text"),
        ("a.ndjson", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.json", "json"),
        ("a.csv", "csv"),
        ("a.tsv.gz", "tsv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a", None),
        ("a.png", None),
        (".txt", None),
    ],
)
def test_what_a_file_holds_is_told_by_its_ending(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file or directory; expected a path, a glob"),
        ("b.tx", "did you mean .*b.txt"),
        ("*.rst", r"\*.rst.*: matches no file"),
        ("*.png", "none of its 1 files is of a known kind"),
        ("empty", "no file of a known kind among its 0 files"),
        ("picture.png", "unknown kind of file '.png'; expected an ending of .jsonl"),
        ("plain", r"unknown kind of file '\(no ending\)'"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_source_that_gives_nothing_is_refused_with_the_reason(tree: Path, source: str, message: str) -> None:
    (tree / "empty").mkdir()
    (tree / "plain").write_text("x")
    with pytest.raises(DataError, match=message):
        find(str(tree / source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", True),
        ("stanford-nlp/imdb.v2", True),
        ("org/name.txt", False),
        ("here/name", False),
        ("a/b/c", False),
        ("name", False),
        ("/org/name", False),
        ("./name", False),
        ("org/*", False),
    ],
)
def test_hub_names_are_told_from_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_like_hub_name(source) is expected


def test_packed_files_and_texts_in_memory_open_as_plain_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüße\r\n".encode()))
    for file in (find(str(tmp_path / "a.txt.gz"))[0], SourceFile("m", "text", text="grüße\r\n")):
        with file.open() as handle:
            assert handle.read() == "grüße\r\n".encode()


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("é" * 2000, "é" * 1000),
        ("é".encode() * 2000, "é" * 1000),
        (b"\xff\x00ok", "\ufffd\x00ok"),
        ("\udcffok", "\ufffdok"),
        ("", ""),
    ],
)
def test_the_raw_text_of_a_bad_row_is_cut_and_can_be_written(raw: str | bytes, kept: str) -> None:
    row = BadRow.of(SourceFile("f", "text"), 3, "why", raw)
    assert row.raw == kept
    assert str(row) == "f, row 3: why"
    row.raw.encode()


def test_what_is_no_file_is_told_and_does_not_suggest_itself(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match="neither a file nor a directory; expected a path"):
        find(str(tmp_path / "loop.txt"))
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file or directory, did you mean '.*/text\.txt'"):
        find(str(tmp_path / "texd.txt"))


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(DataError, match="no home folder of that user"):
        find("~nobody-has-this-name/x.txt")
