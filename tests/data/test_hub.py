"""Datasets of the Hugging Face hub, with a stand-in for the library that fetches them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.data.hub import fetch
from paceline.errors import DataError, MissingExtraError

ROWS = [{"text": "zwö", "id": 1}, {"text": None, "id": 2}]


def install(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(name: str, **options: Any) -> Any:
        calls.append((name, options))
        return rows() if callable(rows) else iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, ROWS)
    said: list[str] = []
    for _ in range(2):
        file = fetch("org/name", ("text",), tmp_path / "hub", said.append)
        assert file.path is not None
        assert [json.loads(line) for line in file.path.read_text().splitlines()] == [{"text": "zwö"}, {"text": None}]
        assert (file.name, file.kind) == ("org/name", "jsonl")
    assert calls == [("org/name", {"split": "train", "streaming": True})]
    assert said[0].startswith("fetching the dataset org/name")
    assert said[1].startswith("using the copy")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[hub\]'"):
        fetch("org/name", ("text",), tmp_path, print)


def test_a_missing_column_is_an_error_that_names_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, ROWS)
    with pytest.raises(DataError, match="no column 'body'; it has 'text', 'id'"):
        fetch("org/name", ("body",), tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_fails_is_told_in_one_line_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise ConnectionError("no route to host\nand much more")

    install(monkeypatch, rows)
    with pytest.raises(DataError, match=r"cannot be fetched from the Hugging Face hub: no route to host$"):
        fetch("org/name", ("text",), tmp_path, print)
    assert list(tmp_path.iterdir()) == []
