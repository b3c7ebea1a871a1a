"""Find the files that a source of the config names.

A source is a named corpus, a file, a directory (with all below it; links to directories are not followed), or a glob
(``**`` crosses directories); a leading ``~`` is the home folder. A corpus goes before a path of the same name: write
``./python-docs`` for the path. What a file holds is told by its ending. In directories and globs, hidden files and
files of unknown ending are passed over; a file named itself must have a known ending. Files come in the order of their
paths.
"""

import difflib
import glob
import gzip
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self, cast

from paceline.data.corpus import CORPORA
from paceline.errors import DataError

RAW_CHARACTERS = 1000

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

TABLE_ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# fmt: off
TEXT_ENDINGS = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log", ".html", ".htm", ".xml", ".toml",
    ".yaml", ".yml", ".ini", ".cfg", ".sql", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go",
    ".java", ".kt", ".scala", ".js", ".mjs", ".ts", ".rb", ".pl", ".php", ".sh", ".lua", ".r", ".jl", ".hs", ".ml",
    ".swift",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: on disk (``path``) or, for a corpus that keeps it elsewhere, in memory (``text``)."""

    name: str
    kind: Kind
    path: Path | None = None
    text: str = ""

    @property
    def packed(self) -> bool:
        """Whether it is compressed with gzip."""
        return self.path is not None and self.path.suffix.lower() == ".gz"

    def open(self) -> BinaryIO:
        """The content as a stream of bytes, unpacked; ``OSError`` if it cannot be read."""
        if self.path is None:
            return io.BytesIO(self.text.encode())
        if self.packed:
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or a whole file (row 0), that cannot be learned from: where it is, why, and how it begins."""

    name: str
    row: int
    reason: str
    raw: str

    def __str__(self) -> str:
        return f"{self.name}, row {self.row}: {self.reason}" if self.row else f"{self.name} {self.reason}"

    @classmethod
    def of(cls, file: SourceFile, row: int, reason: str, raw: str | bytes = "") -> Self:
        """A bad row of ``file``, with ``raw`` cut to ``RAW_CHARACTERS`` and made printable as UTF-8."""
        start = raw[: 4 * RAW_CHARACTERS]
        encoded = start if isinstance(start, bytes) else start.encode("utf-8", "surrogateescape")
        return cls(file.name, row, reason, encoded.decode("utf-8", "replace")[:RAW_CHARACTERS])


def find(source: str) -> tuple[SourceFile, ...]:
    """The files of a source, in sorted order; ``DataError`` if there are none or one is of an unknown kind."""
    if source in CORPORA:
        return _corpus(source)
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return (_named_file(path),)
        if path.is_dir():
            return _directory(path, source)
    except OSError as error:
        raise DataError(f"data.source={source!r}: {error.strerror}") from None
    except RuntimeError:  # of expanduser: ~name
        raise DataError(f"data.source={source!r}: this machine knows no home folder of that user") from None
    if glob.has_magic(source):
        return _glob(str(path), source)
    problem = "neither a file nor a directory" if os.path.lexists(path) else f"no such file or directory{_near(path)}"
    raise DataError(f"data.source={source!r}: {problem}; expected {_EXPECTED}")


_EXPECTED = f"a path, a glob, a Hugging Face dataset (org/name) or a named corpus ({', '.join(CORPORA)})"


def looks_like_hub_name(source: str) -> bool:
    """Whether ``source`` can only be ``organisation/dataset`` on the Hugging Face hub: no path, no known ending."""
    organisation, _, dataset = source.partition("/")
    form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None
    return form and kind_of(Path(dataset)) is None and not Path(organisation).exists()


def kind_of(path: Path) -> Kind | None:
    """What the file's ending says it holds, or None. A ``.gz`` is looked through, except on Parquet."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    packed = bool(endings) and endings[-1] == ".gz"
    ending = "".join(endings[-2:-1] if packed else endings[-1:])
    kind: Kind | None = "text" if ending in TEXT_ENDINGS else TABLE_ENDINGS.get(ending)
    return None if packed and kind == "parquet" else kind


def _corpus(name: str) -> tuple[SourceFile, ...]:
    def entries() -> Iterator[SourceFile]:
        for entry, content in CORPORA[name]():
            if isinstance(content, Path):
                yield SourceFile(f"{name}/{entry}", "text", path=content)
            else:
                yield SourceFile(f"{name}/{entry}", "text", text=content)

    return tuple(entries())


def _named_file(path: Path) -> SourceFile:
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown kind of file {''.join(path.suffixes[-2:]) or '(no ending)'!r}; expected an ending of"
            f" {' '.join(TABLE_ENDINGS)} or of text ({' '.join(sorted(TEXT_ENDINGS))})"
        )
    return SourceFile(str(path), kind, path)


def _directory(folder: Path, source: str) -> tuple[SourceFile, ...]:
    def refuse(error: OSError) -> None:
        raise DataError(f"data.source={source!r}: {error.filename}: {error.strerror}")

    found = []
    for current, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(current, name) for name in names if not name.startswith(".")]
    return _known(found, source, f"no file of a known kind among its {len(found)} files")


def _glob(pattern: str, source: str) -> tuple[SourceFile, ...]:
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = [path for path in found if path.is_file()]
    reason = f"none of its {len(files)} files is of a known kind" if files else "matches no file"
    return _known(files, source, reason)


def _known(paths: list[Path], source: str, otherwise: str) -> tuple[SourceFile, ...]:
    kinds = [(path, kind_of(path)) for path in sorted(set(paths), key=lambda path: path.parts) if path.is_file()]
    files = tuple(SourceFile(str(path), kind, path) for path, kind in kinds if kind)
    if not files:
        raise DataError(
            f"data.source={source!r}: {otherwise}; known endings: .txt .md .py {' '.join(TABLE_ENDINGS)} ..."
        )
    return files


def _near(path: Path) -> str:
    names = [name for name in os.listdir(path.parent) if name != path.name] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean {str(path.with_name(near[0]))!r}?" if near else ""
