"""Copy a dataset of the Hugging Face hub to JSON lines, once; from there on it is a file like any other."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.data.read import SourceFile
from paceline.errors import DataError, MissingExtraError


def fetch(name: str, columns: Sequence[str], folder: Path, say: Callable[[str], None]) -> SourceFile:
    """The columns of the dataset's ``train`` split, as a file in ``folder``; an earlier copy is used as it is.

    ``MissingExtraError`` without the ``datasets`` library; ``DataError`` if the dataset or a column is not there, or
    there is no network.
    """
    path = folder / f"{name.replace('/', '--')}--{'--'.join(columns)}.jsonl"
    if path.exists():
        say(f"using the copy of the dataset {name} in {path}; remove it to fetch anew")
        return SourceFile(name, "jsonl", path)
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"data.source={name!r}: no such path; to read it as a Hugging Face dataset: pip install 'paceline[hub]'"
        ) from None
    say(f"fetching the dataset {name} from the Hugging Face hub to {path}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        _copy(name, columns, datasets.load_dataset(name, split="train", streaming=True), temporary)
        temporary.rename(path)
    except DataError:
        raise
    except Exception as error:  # whatever its many file formats and the network may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"data.source={name!r}: no such path, and it cannot be fetched from the Hugging Face hub: {reason}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return SourceFile(name, "jsonl", path)


def _copy(name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            for column in columns:
                if column not in row:
                    raise DataError(f"dataset {name!r}: no column {column!r}; it has {', '.join(map(repr, row))}")
            file.write(json.dumps({column: row[column] for column in columns}, default=repr) + "\n")
