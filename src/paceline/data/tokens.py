"""Tokenised documents on disk: one flat stream of token ids, and where each document begins in it.

A set is a folder of ``.npy`` files, mapped into memory when opened, so that a set of any size opens at once and the
ranks of one machine share its pages:

    tokens.npy    (N,) uint16 or uint32     the documents one after the other, each ended by the end-of-text token
    offsets.npy   (D + 1,) int64            document d is tokens[offsets[d]:offsets[d + 1]]
    files.npy     (D,) int32                the file the document came from
    labels.npy    (D,) int64                a hash of what its row says of where it belongs, if that was asked for
    set.json      {"bytes": ...}            UTF-8 bytes of the text, for bits per byte
    target/                                 the second column of paired data: a set of the same D
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenSet:
    """One tokenised part (train or held-out) of one source.

    ``tokens`` (N,) uint16 | uint32; ``offsets`` (D + 1,) int64: document d is ``tokens[offsets[d]:offsets[d + 1]]`` and
    its last token is the end-of-text token; ``files`` (D,) int32, the index of the file the document came from;
    ``n_bytes``, UTF-8 bytes of the text; ``target``, of the same D, the second column of paired data.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    files: NDArray[np.int32]
    n_bytes: int
    target: "TokenSet | None" = None
    labels: NDArray[np.int64] | None = None
    """(D,) hashes of what the rows of the documents say of where they belong."""

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray[Any]:
        """The token ids of one document, the end-of-text token last."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def open(cls, folder: Path) -> "TokenSet":
        """Map the set written to ``folder`` into memory."""
        target, labels = folder / "target", folder / "labels.npy"
        return cls(
            tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            files=np.load(folder / "files.npy", mmap_mode="r"),
            n_bytes=json.loads((folder / "set.json").read_text())["bytes"],
            target=cls.open(target) if target.exists() else None,
            labels=np.load(labels, mmap_mode="r") if labels.exists() else None,
        )


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest type that holds ids below ``vocabulary``: uint16 or uint32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def write_set(
    folder: Path,
    blocks: Iterable[NDArray[Any]],
    *,
    dtype: np.dtype[Any],
    lengths: NDArray[np.int64],
    files: NDArray[np.int32],
    n_bytes: int,
    labels: NDArray[np.int64] | None = None,
) -> None:
    """Write a set whose token stream is the concatenation of ``blocks``; ``lengths`` (D,) are tokens per document.

    Written with ordinary writes, not through a memory map: a full disk is then an ``OSError``, not a SIGBUS.
    """
    folder.mkdir(parents=True)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    with (folder / "tokens.npy").open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        written = sum(file.write(np.ascontiguousarray(block, dtype).data) for block in blocks)
    assert written == offsets[-1] * dtype.itemsize, f"{written} bytes of tokens for {offsets[-1]} tokens"
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "files.npy", files.astype(np.int32))
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    (folder / "set.json").write_text(json.dumps({"bytes": n_bytes}))
