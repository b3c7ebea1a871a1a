"""Write safetensors files tensor by tensor, so that a model is never in memory a second time.

The format (huggingface/safetensors): 8 bytes, the length N of the header as little-endian; N bytes of JSON,
``{name: {dtype, shape, data_offsets: [begin, end]}}``; then the bytes of all tensors without gaps. The header comes
first, so shapes are taken from tensors on the meta device and the values follow.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_sharded(
    folder: Path, shapes: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> list[Path]:
    """Write ``values`` to one file, or to several of at most ``shard_bytes`` (and one tensor) with an index.

    ``shapes`` holds a tensor of the right shape and dtype (meta will do) for each name, in the order in which
    ``values`` gives them. Returns the files with tensors, in order.
    """
    assert sys.byteorder == "little"  # the format is, and tensors are written as they lie in memory
    shards = _split(shapes, shard_bytes)
    names = (
        [WHOLE]
        if len(shards) == 1
        else [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    )
    stream = iter(values)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(_header(shard))
            for name, expected in shard.items():
                _write_next(file, stream, name, expected)
    assert next(stream, None) is None, "more values than shapes"
    if len(shards) > 1:
        where = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in shapes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _split(shapes: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in shapes.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _header(shard: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    begin = 0
    for name, tensor in shard.items():
        end = begin + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _write_next(file: BinaryIO, stream: Iterable[tuple[str, Tensor]], name: str, expected: Tensor) -> None:
    given, tensor = next(iter(stream))
    assert (given, tensor.shape, tensor.dtype) == (name, expected.shape, expected.dtype), (given, name)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)
