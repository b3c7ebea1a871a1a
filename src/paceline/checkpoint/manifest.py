"""``manifest.json``: what a checkpoint holds, where each box of each tensor lies, and the checksums of its files.

    {"format": 1, "step": 100, "created": "2026-01-31T12:00:00+00:00", "paceline": "0.1.0", "torch": "2.13.0",
     "layout": {"replicas": 2, "shard": 1},
     "values": {"tokens_seen": 409600, ...},
     "tensors": {"model/norm.weight": {
        "dtype": "float32", "shape": [64], "kind": "parameter", "rule": null,
        "parts": [{"file": "rank-00000.safetensors", "key": "model/norm.weight", "start": [0], "shape": [64]}]}},
     "files": {"rank-00000.safetensors": {"bytes": 3232, "sha256": "..."}},
     "sha256": "..."}

The last entry is the checksum of all the others, so that a changed digit anywhere is found.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue

from paceline.checkpoint.state import Kind, Rule

NAME = "manifest.json"
FORMAT = 1

Json: TypeAlias = JsonValue


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Frozen):
    """One box of a tensor: ``full[start : start + shape]`` is the tensor ``key`` of ``file``."""

    file: str
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(_Frozen):
    """One named tensor; ``shape`` is the full one, with the leading axis of per-replica and opaque kinds."""

    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    rule: Rule | None
    parts: tuple[Part, ...]

    @property
    def holders(self) -> list[int]:
        """Of a per-replica tensor, the replicas that had one: an optimizer begins a state with its first gradient."""
        return sorted({part.start[0] for part in self.parts})


class FileRecord(_Frozen):
    """Size and checksum of one file."""

    bytes: int
    sha256: str


class Manifest(_Frozen):
    """The whole of ``manifest.json`` but its own checksum."""

    format: int
    step: int
    created: str
    paceline: str
    torch: str
    layout: dict[str, int]
    values: dict[str, Json]
    tensors: dict[str, Entry]
    files: dict[str, FileRecord]

    def text(self) -> str:
        """The manifest as JSON with its checksum."""
        body = self.model_dump(mode="json", exclude={"values"}) | {"values": self.values}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (body | {"sha256": _digest(body)}).items()]
        return "{" + ",\n ".join(lines) + "}\n"

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Read what ``text`` wrote; ``ValueError`` says in a few words why it cannot be trusted."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not valid JSON at line {error.lineno}, column {error.colno}") from None
        if not isinstance(body, dict) or not isinstance(body.get("format"), int):
            raise ValueError("it names no format")
        if body["format"] > FORMAT:
            raise ValueError(
                f"it is of format {body['format']}, this paceline reads up to {FORMAT}; install a newer one"
            )
        if body.pop("sha256", None) != _digest(body):
            raise ValueError("its checksum does not match its content")
        return cls.model_validate(body)


def checked_values(values: Mapping[str, Json]) -> dict[str, Json]:
    """A copy of ``values``; ``ValueError`` for what JSON would not give back exactly (tuples, int keys, NaN)."""
    copy: dict[str, Json] = {}
    for key, value in values.items():
        try:
            copy[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"value {key!r} of a checkpoint cannot be written as JSON: {error}") from None
        if not isinstance(key, str) or not _same(copy[key], value):
            raise ValueError(f"value {key!r} of a checkpoint would change when written as JSON: {value!r}")
    return copy


def merge(shares: Iterable[Mapping[str, Entry]]) -> dict[str, Entry]:
    """Join what every rank wrote; ``ValueError`` unless the parts of each tensor cover it exactly once.

    Of a per-replica tensor they cover what each replica has that has any.
    """
    joined: dict[str, Entry] = {}
    for share in shares:
        for name, entry in share.items():
            known = joined.setdefault(name, entry)
            if known is entry:
                continue
            if known.model_copy(update={"parts": ()}) != entry.model_copy(update={"parts": ()}):
                raise ValueError(f"{name} is {_about(known)} on one rank and {_about(entry)} on another")
            joined[name] = known.model_copy(update={"parts": known.parts + entry.parts})
    covered: set[object] = set()  # most tensors are cut in one of a few ways
    for name, entry in joined.items():
        cut = (entry.kind, entry.shape, tuple((part.start, part.shape) for part in entry.parts))
        if cut not in covered and (problem := _problem(entry)):
            raise ValueError(f"{name}: {problem}")
        covered.add(cut)
    return {name: joined[name] for name in sorted(joined)}


def _about(entry: Entry) -> str:
    return f"{entry.kind} {entry.dtype} {list(entry.shape)}"


def _problem(entry: Entry) -> str | None:
    if entry.kind is not Kind.PER_REPLICA:
        return _not_covered(entry.shape, entry.parts)
    whole = (len(entry.holders), *entry.shape[1:])
    places = {replica: (place,) for place, replica in enumerate(entry.holders) if replica < entry.shape[0]}
    own = [part.model_copy(update={"start": places.get(part.start[0], (-1,)) + part.start[1:]}) for part in entry.parts]
    return _not_covered(whole, own)


def _not_covered(shape: Sequence[int], parts: Sequence[Part]) -> str | None:
    written, wanted = sum(math.prod(part.shape) for part in parts), math.prod(shape)
    starts = np.array([part.start for part in parts], dtype=np.int64).reshape(len(parts), len(shape))
    ends = starts + np.array([part.shape for part in parts], dtype=np.int64).reshape(starts.shape)
    if (starts < 0).any() or (ends > np.array(shape, dtype=np.int64)).any():
        return f"a part lies outside of its shape {list(shape)}"
    for i in range(len(parts) - 1):
        if ((starts[i] < ends[i + 1 :]) & (starts[i + 1 :] < ends[i])).all(axis=1).any():
            return "two parts overlap, so two ranks wrote the same elements"
    return None if written == wanted else f"the ranks wrote {written} of its {wanted} elements"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _same(a: Any, b: Any) -> bool:
    """Equal and of the same types all the way down (1, 1.0 and True are equal in Python, but not the same)."""
    if isinstance(a, dict) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
