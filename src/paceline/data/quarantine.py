"""The file that keeps rows nothing can be learned from, so that none vanishes: one JSON object a row."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from paceline.data.read import BadRow


class Quarantine:
    """Writes bad rows to ``path``: ``{"name": ..., "row": ..., "reason": ..., "raw": ...}``, the raw text cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: BadRow) -> None:
        """Write one row."""
        self._file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Bring to the file what was added so far."""
        self._file.flush()
