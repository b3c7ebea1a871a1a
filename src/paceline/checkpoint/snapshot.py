"""The copy of a rank's state that a background thread writes while training goes on.

The copy is the data section of the safetensors files themselves: one flat buffer, kept from save to save (a fresh one
costs a page fault for every 4 KiB, ten times the copy), into which every block is copied at the place it has in its
file. So a file is written as header and buffer in one pass that also hashes it, and a failure to write is an
``OSError`` with its number; the safetensors library's own writer offers neither. The library reads the files.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.checkpoint.manifest import Entry, Part
from paceline.checkpoint.state import TensorState, tied
from paceline.comm.boxes import Block
from paceline.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's dtypes and their names in a safetensors header."""


@dataclass(frozen=True, slots=True)
class Image:
    """The content of one file. The body is only good until the next snapshot."""

    name: str
    header: bytes
    body: memoryview


@dataclass(slots=True)
class _File:
    name: str
    pieces: list["_Piece"] = field(default_factory=list)
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    key: str
    source: Tensor
    block: Block
    n_bytes: int


class Snapshot:
    """Copies state into a buffer that is used again by the next copy."""

    def __init__(self, rank: int, file_bytes: int) -> None:
        self._rank = rank
        self._file_bytes = file_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, TensorState]) -> tuple[dict[str, Entry], list[Image]]:
        """Copy what this rank writes of ``tensors``; return the manifest's entries for it and the files' contents."""
        pieces = _pieces(tensors)
        files = self._files(piece for own in pieces.values() for piece in own)
        self._copy(files)
        body, images, at = memoryview(self._buffer.numpy().data), [], 0
        for file in files:
            images.append(Image(file.name, _header(file.pieces), body[at : at + file.n_bytes]))
            at += _aligned(file.n_bytes)
        where = {piece.key: file.name for file in files for piece in file.pieces}
        return _entries(tensors, pieces, where), images

    def _files(self, pieces: Iterator[_Piece]) -> list[_File]:
        files = [_File(f"rank-{self._rank:05d}.safetensors")]
        for piece in pieces:
            if files[-1].pieces and files[-1].n_bytes + piece.n_bytes > self._file_bytes:
                files.append(_File(f"rank-{self._rank:05d}-{len(files)}.safetensors"))
            files[-1].pieces.append(piece)
            files[-1].n_bytes += piece.n_bytes
        for file in files:
            file.pieces.sort(key=lambda piece: -piece.source.dtype.itemsize)  # wide ones first: all are aligned
        return [file for file in files if file.pieces]

    def _copy(self, files: Sequence[_File]) -> None:
        needed = sum(_aligned(file.n_bytes) for file in files)
        on_device = any(piece.source.device.type != "cpu" for file in files for piece in file.pieces)
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
            self._buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=on_device)
        start = 0
        for file in files:
            at = start
            for piece in file.pieces:
                room = self._buffer[at : at + piece.n_bytes].view(piece.source.dtype).view(piece.source.shape)
                room.copy_(piece.source, non_blocking=on_device)
                at += piece.n_bytes
            start += _aligned(file.n_bytes)
        if on_device:
            torch.accelerator.synchronize()


def needed_bytes(tensors: Mapping[str, TensorState]) -> int:
    """Bytes this rank writes at a save of ``tensors``: each tied memory once, and only what it is the writer of."""
    return sum(piece.n_bytes for own in _pieces(tensors).values() for piece in own)


def _pieces(tensors: Mapping[str, TensorState]) -> dict[str, list[_Piece]]:
    """What this rank writes, by the first of the names that share the memory."""
    return {
        name: [_piece(name, i, state.tensor, block) for i, block in enumerate(state.blocks) if math.prod(block.shape)]
        for name, owner in tied(tensors).items()
        if name == owner and _writes(name, state := tensors[name])
    }


def _writes(name: str, state: TensorState) -> bool:
    index, count = state.holder
    return zlib.crc32(name.encode()) % count == index  # spreads the names evenly over the holders, without messages


def _piece(name: str, i: int, local: Tensor, block: Block) -> _Piece:
    if local.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise CheckpointError(f"{name} is of {local.dtype}, which a safetensors file cannot hold; it holds {known}")
    n_bytes = math.prod(block.shape) * local.dtype.itemsize
    return _Piece(name if i == 0 else f"{name}#{i}", block.of(local), block, n_bytes)


def _entries(
    tensors: Mapping[str, TensorState], pieces: Mapping[str, Sequence[_Piece]], where: Mapping[str, str]
) -> dict[str, Entry]:
    """What this rank tells of: all that it writes, and, as the first holder, all that another one should write."""
    entries = {}
    for name, owner in tied(tensors).items():
        state = tensors[name]
        if owner not in pieces and state.holder[0] != 0:
            continue
        entries[name] = Entry(
            dtype=str(state.tensor.dtype).removeprefix("torch."),
            shape=state.full_shape,
            kind=state.kind,
            rule=state.rule,
            parts=tuple(
                Part(file=where[piece.key], key=piece.key, start=piece.block.start, shape=piece.block.shape)
                for piece in pieces.get(owner, ())
            ),
        )
    return entries


def _header(pieces: Sequence[_Piece]) -> bytes:
    """The safetensors header: its length as a little-endian uint64, then JSON padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        table[piece.key] = {
            "dtype": DTYPES[piece.source.dtype],
            "shape": piece.block.shape,
            "data_offsets": [at, at + piece.n_bytes],
        }
        at += piece.n_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64
