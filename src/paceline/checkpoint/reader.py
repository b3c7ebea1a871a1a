"""Loading: any box of any tensor of a checkpoint, under whatever layout it was saved, and nothing unnoticed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paceline.checkpoint import disk, manifest
from paceline.checkpoint.folder import step_name, steps
from paceline.checkpoint.manifest import Entry, Json, Manifest, Part
from paceline.checkpoint.state import Kind, Rule, TensorState, tied
from paceline.comm.boxes import Block, Shape
from paceline.errors import CheckpointError

_MODEL, _AVERAGE = "model/", "average/"
_Window: TypeAlias = tuple[slice, ...]


def load(folder: Path, step: int) -> "Checkpoint":
    """Open the checkpoint of a step; tensors are read when asked for.

    Raises ``CheckpointError`` if there is none, its manifest is damaged or of a newer format, or a file is missing or
    cut short. Content is not checked here: see ``Checkpoint.verify``.
    """
    known = steps(folder)
    if step not in known:
        there = f"steps there: {', '.join(map(str, known))}" if known else "no step is saved there"
        raise CheckpointError(f"there is no checkpoint of step {step} in {folder}; {there}")
    try:
        return _opened(folder, step)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} {_advice(folder, step, lambda other: _opened(folder, other), 'complete')}"
        ) from None


class Checkpoint:
    """A saved step. Use as a context manager, or ``close`` it, to let go of its files."""

    def __init__(self, folder: Path, content: Manifest) -> None:
        self._folder = folder
        self._manifest = content
        self._files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self._manifest.step

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self._folder / step_name(self.step)

    @property
    def values(self) -> dict[str, Json]:
        """The values given to ``save``, exactly."""
        return self._manifest.values

    @property
    def layout(self) -> dict[str, int]:
        """The layout it was saved under."""
        return self._manifest.layout

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._manifest.tensors)

    def entry(self, name: str) -> Entry:
        """Dtype, full shape, kind, rule and parts of a tensor."""
        if name not in self._manifest.tensors:
            raise CheckpointError(
                f"step {self.step} holds no {name}; it has {len(self.names)} tensors: {_some(self.names)}"
            )
        return self._manifest.tensors[name]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in its saved dtype."""
        shape = self.entry(name).shape
        return self.slice(name, (0,) * len(shape), shape)

    def common(self, name: str) -> Tensor:
        """A whole tensor as all replicas have it; where they differ, the mean over them."""
        entry = self.entry(name)
        if entry.kind is not Kind.PER_REPLICA:
            return self.tensor(name)
        return self._mean(name, (0,) * (len(entry.shape) - 1), entry.shape[1:])

    def slice(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The box ``full[start : start + shape]`` of a tensor; only its own bytes are read."""
        entry = self.entry(name)
        end = [at + size for at, size in zip(start, shape, strict=True)]
        assert all(0 <= a <= b <= full for a, b, full in zip(start, end, entry.shape, strict=True)), (
            name,
            start,
            shape,
        )
        result = torch.empty(tuple(shape), dtype=getattr(torch, entry.dtype))
        for part in entry.parts:
            low = [max(a, b) for a, b in zip(start, part.start, strict=True)]
            high = [min(a, b + size) for a, b, size in zip(end, part.start, part.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                result[_window(low, high, start)] = self._read(part, _window(low, high, part.start))
        return result

    def require(self, names: Collection[str], *, prefix: str = "") -> None:
        """``CheckpointError`` unless the tensors whose names begin with ``prefix`` are exactly ``names``."""
        saved = {name for name in self.names if name.startswith(prefix)}
        missing, extra = sorted(set(names) - saved), sorted(saved - set(names))
        problems = []
        if missing:
            problems.append(f"does not hold {len(missing)} that this run needs ({_some(missing)})")
        if extra:
            problems.append(f"holds {len(extra)} that this run does not know ({_some(extra)})")
        if problems:
            raise CheckpointError(
                f"the tensors of step {self.step} are not those of this run: it {' and '.join(problems)}. Resume with "
                f"the model, optimizer and sync it was saved with, or start anew in another train.output."
            )

    def restore(
        self,
        tensors: Mapping[str, TensorState],
        *,
        layout: Mapping[str, int],
        prefix: str = "",
        elsewhere: Collection[str] = (),
    ) -> None:
        """Fill every tensor in place with its own boxes; the counterpart of ``Checkpointer.save``.

        Args:
            tensors: what is to be filled: all names of the checkpoint that begin with ``prefix``, and no others,
                but for those that other ranks alone hold.
            layout: what a ``Checkpointer`` of this run is given.
            prefix: for a part of the state, such as ``model/``.
            elsewhere: names that other ranks alone hold.

        Raises ``CheckpointError`` if names, dtypes, shapes or kinds differ, if opaque state meets another layout, or if
        names that share memory here were saved with different values.
        """
        self.require({*tensors, *elsewhere}, prefix=prefix)
        problems = [text for name in sorted(tensors) if (text := self._mismatch(name, tensors[name], layout))]
        if problems:
            raise CheckpointError(f"step {self.step} does not fit this run: {_some(problems, '; ')}")
        owners = tied(tensors)
        for name in sorted(tensors):
            self._fill(name, tensors[name], owners[name])

    def verify(self) -> None:
        """Read every file and compare its SHA-256; ``CheckpointError`` names the first that differs."""
        try:
            self._verify()
        except CheckpointError as error:
            advice = _advice(self._folder, self.step, lambda other: _opened(self._folder, other)._verify(), "good")
            raise CheckpointError(f"{error} {advice}") from None

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, part: Part, window: _Window) -> Tensor:
        try:
            if part.file not in self._files:
                self._files[part.file] = safe_open(self.path / part.file, framework="pt")
            box: Tensor = self._files[part.file].get_slice(part.key)[window]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / part.file} is damaged: {error}") from None
        return box

    def _fill(self, name: str, state: TensorState, owner: str) -> None:
        for block in state.blocks:
            saved, room = self._block(name, state, block), block.of(state.tensor)
            if saved is None:
                continue
            if name != owner and not torch.equal(room.cpu(), saved):
                raise CheckpointError(f"{name} and {owner} are one tensor in this run, but differ in step {self.step}")
            room.copy_(saved)

    def _block(self, name: str, state: TensorState, block: Block) -> Tensor | None:
        """The saved value of a block, by the rule where the number of replicas differs; None leaves it as it is."""
        entry = self.entry(name)
        saved, is_own = entry.shape, state.kind is Kind.PER_REPLICA
        if entry.kind is not Kind.PER_REPLICA:
            start, shape = (block.start[1:], block.shape[1:]) if is_own else (block.start, block.shape)
            return self.slice(name, start, shape).view(block.shape)
        if is_own and saved == state.full_shape:
            if block.start[0] not in entry.holders:
                raise CheckpointError(f"replica {block.start[0]} saved no {name} in step {self.step}")
            return self.slice(name, block.start, block.shape)
        replica, start, shape = (
            (block.start[0], block.start[1:], block.shape[1:]) if is_own else (0, block.start, block.shape)
        )
        rule = state.rule or entry.rule
        if rule is Rule.MEAN:
            return self._mean(name, start, shape).view(block.shape)
        if rule is Rule.CLONE:
            holder = entry.holders[replica % len(entry.holders)]
            return self.slice(name, (holder, *start), (1, *shape)).view(block.shape)
        return None

    def _mean(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Of a box, over the replicas that saved one; exact where they hold the same."""
        every = torch.cat([self.slice(name, (at, *start), (1, *shape)) for at in self.entry(name).holders])
        if all(torch.equal(every[0], other) for other in every[1:]):
            return every[0]
        return every.double().mean(0).to(every.dtype)

    def _mismatch(self, name: str, state: TensorState, layout: Mapping[str, int]) -> str | None:
        entry = self.entry(name)
        dtype = str(state.tensor.dtype).removeprefix("torch.")
        if entry.kind is not state.kind and not _may_become(entry.kind, state.kind):
            return f"{name} was saved as {entry.kind} and is {state.kind} here"
        if entry.dtype != dtype:
            return f"{name} was saved in {entry.dtype} and is {dtype} here"
        if entry.kind is Kind.OPAQUE and self.layout != dict(layout):
            return (
                f"{name} can only be loaded under the layout it was saved with, {_sizes(self.layout)}; this run has "
                f"{_sizes(layout)}"
            )
        if _comparable(entry.shape, entry.kind) != _comparable(state.full_shape, state.kind):
            return f"{name} was saved with shape {list(entry.shape)} and has {list(state.full_shape)} here"
        return None

    def _verify(self) -> None:
        for name, record in sorted(self._manifest.files.items()):
            try:
                found = disk.checksum(self.path / name)
            except OSError as error:
                raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror}.") from None
            if found != record.sha256:
                raise CheckpointError(
                    f"{self.path / name} is damaged: sha256 {found[:12]}..., expected {record.sha256[:12]}...."
                )


class SavedWeights(Mapping[str, Tensor]):
    """The model of a checkpoint, by the names of its state, each tensor read whole when it is asked for.

    ``averaged``: the average of a parameter in its place.
    """

    def __init__(self, checkpoint: Checkpoint, *, averaged: bool = False) -> None:
        self._checkpoint = checkpoint
        self._names = [name.removeprefix(_MODEL) for name in checkpoint.names if name.startswith(_MODEL)]
        self._averaged = set(checkpoint.names) & {_AVERAGE + name for name in self._names if averaged}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        own = _AVERAGE + name
        return self._checkpoint.common(own if own in self._averaged else _MODEL + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _opened(folder: Path, step: int) -> Checkpoint:
    """The checkpoint, if all its files are there in full; errors without advice."""
    path = folder / step_name(step)
    try:
        content = Manifest.parse((path / manifest.NAME).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"step {step} has no {manifest.NAME} in {path}.") from None
    except OSError as error:
        raise CheckpointError(f"{path / manifest.NAME} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path / manifest.NAME} is damaged: {where}: {first['msg'].lower()}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path / manifest.NAME} cannot be used: {error}.") from None
    missing = sorted(name for name in content.files if not (path / name).is_file())
    if missing:
        there = len(content.files) - len(missing)
        raise CheckpointError(
            f"step {step} has {there} of {len(content.files)} shard files (missing: {_some(missing)})."
        )
    for name, record in sorted(content.files.items()):
        size = (path / name).stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{path / name} has {size} bytes, expected {record.bytes}.")
    return Checkpoint(folder, content)


def _advice(folder: Path, step: int, check: Callable[[int], object], word: str) -> str:
    for other in reversed(steps(folder)):
        if other != step:
            with suppress(CheckpointError):
                check(other)
                return f"The newest {word} step is {other}: resume from it with checkpoint.resume={other}."
    return f"No other step there is {word}: start anew in another train.output."


def _window(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> _Window:
    return tuple(slice(a - at, b - at) for a, b, at in zip(low, high, origin, strict=True))


def _may_become(saved: Kind, here: Kind) -> bool:
    """What one replica, or equal ones, have once, several that differ have once each."""
    return Kind.PER_REPLICA in {saved, here} and {saved, here} <= {Kind.PARAMETER, Kind.REPLICATED, Kind.PER_REPLICA}


def _comparable(shape: Shape, kind: Kind) -> Shape:
    return shape[1:] if kind is Kind.PER_REPLICA else shape


def _sizes(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{key}={size}" for key, size in layout.items()) or "none"


def _some(items: Sequence[str], separator: str = ", ", n: int = 5) -> str:
    rest = f"{separator}and {len(items) - n} more" if len(items) > n else ""
    return separator.join(items[:n]) + rest
