"""Collect the tokenised documents of a source, then cut off the part that is held out.

Which documents are held out is a function of their text alone (of the first text of a pair): its hash is compared with
the fraction, so that a document that stands in the data twice falls to one side, and more data moves no document. Where
there are too few for that (under 100, or none that the hash picks) the end of the token stream is held out instead: the
share that was asked for, but at least 1,024 tokens or, if that is less, a tenth of all. Where that cuts through a
document, an end-of-text token closes its first half. Of pairs, whole ones are held out: the share, but at least one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.data.encode import Encoded
from paceline.data.tokens import write_set

FEW_DOCUMENTS = 100
_LEAST_TOKENS = 1024

DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("file", "<i4"), ("key", "<u8"), ("label", "<i8")])
"""What is kept of a document: its length with the end-of-text token, its UTF-8 bytes, its file, its hash, its label."""


def is_held_out(key: Any, fraction: float) -> Any:
    """Whether a document with the 64-bit hash ``key`` (a number, or an array of uint64) is held out."""
    return key < np.uint64(int(fraction * 2.0**64))


class TokenLog:
    """Tokenised documents of one source, appended to files in ``folder`` while they arrive."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], end: int, *, labelled: bool = False) -> None:
        folder.mkdir(parents=True)
        self.folder, self.labelled = folder, labelled
        self.dtype, self.end = dtype, end
        self._tokens_path, self._documents_path = folder / "tokens", folder / "documents"
        self._tokens, self._documents = self._tokens_path.open("wb"), self._documents_path.open("wb")
        self._open_tokens = self._open_bytes = 0  # of a document whose end has not come yet

    def append(self, encoded: Encoded, n_bytes: NDArray[np.int64], ends: NDArray[np.bool_], meta: NDArray[Any]) -> None:
        """Append P pieces of documents.

        ``n_bytes`` (P,) and ``ends`` (P,) say of each piece how long its text is and whether its document ends with it;
        ``meta`` (documents that end,) has their ``file``, ``key`` and ``label`` as ``DOCUMENT``.
        """
        ids, lengths = encoded
        behind = np.cumsum(lengths)
        np.insert(ids, behind[ends], self.end).astype(self.dtype).tofile(self._tokens)
        tokens_until = np.concatenate([[-self._open_tokens], behind[ends] + np.arange(1, len(meta) + 1)])
        bytes_until = np.concatenate([[-self._open_bytes], np.cumsum(n_bytes)[ends]])
        documents = meta.copy()
        documents["tokens"], documents["bytes"] = np.diff(tokens_until), np.diff(bytes_until)
        documents.tofile(self._documents)
        self._open_tokens = int(lengths.sum()) + len(meta) - int(tokens_until[-1])
        self._open_bytes = int(n_bytes.sum()) - int(bytes_until[-1])

    def close(self) -> None:
        """Write out what is buffered; the log is then read by ``split``."""
        assert self._open_tokens == self._open_bytes == 0, "the last document has no end"
        self._tokens.close()
        self._documents.close()

    def read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The token stream (N,) and the documents (D,) of type ``DOCUMENT``, mapped into memory."""
        return _map(self._tokens_path, self.dtype), _map(self._documents_path, DOCUMENT)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass(frozen=True)
class Part:
    """Some documents of a log: document i is tokens ``starts[i]`` to ``stops[i]`` of its stream."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    files: NDArray[np.int32]
    labels: NDArray[np.int64]
    n_bytes: int
    closed: bool = True
    """False if the last document is a first half, which still needs its end-of-text token."""

    def write(self, folder: Path, log: TokenLog) -> int:
        """Write the part as a token set; returns how many tokens it has."""
        tokens, _ = log.read()
        lengths = self.stops - self.starts
        if not self.closed:
            lengths[-1] += 1
        write_set(
            folder,
            self._blocks(tokens, log),
            dtype=log.dtype,
            lengths=lengths,
            files=self.files,
            labels=self.labels if log.labelled else None,
            n_bytes=self.n_bytes,
        )
        return int(lengths.sum())

    def _blocks(self, tokens: NDArray[Any], log: TokenLog) -> Iterator[NDArray[Any]]:
        """The stream in as few pieces as it can be copied in: runs of documents that stand one after the other."""
        gap = self.starts[1:] != self.stops[:-1]
        run_starts = self.starts[np.concatenate([[True], gap])[: len(self.starts)]]
        run_stops = self.stops[np.concatenate([gap, [True]])[: len(self.stops)]]
        for start, stop in zip(run_starts.tolist(), run_stops.tolist(), strict=True):
            yield tokens[start:stop]
        if not self.closed:
            yield np.array([log.end], log.dtype)


def split(
    logs: list[TokenLog], fraction: float, originals: int, count_bytes: Callable[[NDArray[Any]], int]
) -> list[tuple[Part, Part]]:
    """Cut each log (one, or two of paired columns) into a training and a held-out part.

    ``originals`` is the number of documents before sentences were cut; ``count_bytes`` says how many UTF-8 bytes the
    text of some tokens has.
    """
    _, documents = logs[0].read()
    chosen = is_held_out(documents["key"], fraction)
    if fraction and (originals < FEW_DOCUMENTS or not chosen.any()):
        if len(logs) == 1:
            return [_cut(logs[0], fraction, count_bytes)]
        count = len(documents)
        chosen = np.arange(count) >= count - min(max(1, round(fraction * count)), count - 1)
    return [(_part(log, ~chosen), _part(log, chosen)) for log in logs]


def _part(log: TokenLog, chosen: NDArray[np.bool_]) -> Part:
    _, documents = log.read()
    stops = np.cumsum(documents["tokens"])
    kept = documents[chosen]
    return Part(
        (stops - documents["tokens"])[chosen],
        stops[chosen],
        kept["file"].astype(np.int32),
        kept["label"].astype(np.int64),
        int(kept["bytes"].sum()),
    )


def _cut(log: TokenLog, fraction: float, count_bytes: Callable[[NDArray[Any]], int]) -> tuple[Part, Part]:
    """Hold out the end of the token stream."""
    tokens, documents = log.read()
    total = len(tokens)
    at = total - min(max(math.ceil(fraction * total), min(_LEAST_TOKENS, total // 10)), total - 1)
    stops = np.cumsum(documents["tokens"])
    starts = stops - documents["tokens"]
    before, behind = _part(log, starts < at), _part(log, stops > at)
    through = (starts < at) & (stops > at)
    if not through.any():
        return before, behind
    n_bytes = int(documents["bytes"][through][0])
    second_bytes = min(n_bytes, count_bytes(tokens[at : int(stops[through][0]) - 1]))
    first = replace(before, stops=np.minimum(before.stops, at), n_bytes=before.n_bytes - second_bytes, closed=False)
    second = replace(behind, starts=np.maximum(behind.starts, at), n_bytes=behind.n_bytes - n_bytes + second_bytes)
    return first, second
