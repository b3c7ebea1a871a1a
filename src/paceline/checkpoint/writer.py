"""Saving: a copy now, the writing behind the training step."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from paceline.checkpoint import disk
from paceline.checkpoint import folder as names
from paceline.checkpoint.commit import Committer, Content
from paceline.checkpoint.exchange import Exchange
from paceline.checkpoint.manifest import Json, checked_values
from paceline.checkpoint.retention import retain
from paceline.checkpoint.snapshot import Snapshot
from paceline.checkpoint.state import TensorState
from paceline.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Saved:
    """A save that is complete: visible, synced, and no longer in need of anything."""

    step: int
    path: Path
    rank_bytes: int
    """Tensor bytes this rank wrote."""
    snapshot_s: float
    """How long training stood still for the copy, without the wait for the save before."""
    write_s: float
    """How long the background thread took, other ranks included."""


class Checkpointer:
    """Saves checkpoints of one run into ``folder``; every rank of the run has one and calls it at the same steps.

    ``save`` copies the state and returns; one background thread writes. An error of that thread is raised on every rank
    as a ``CheckpointError`` by the next call of ``save``, ``poll`` or ``wait``, once. Ranks may come to know of it at
    different calls, so a run that wants to go on after it has to agree on that first: ``wait`` on all ranks does.

    Args:
        folder: made if it is not there. All ranks see the same one. One run owns it at a time.
        rank: of this process among all that save.
        ranks: how many they are.
        exchange: how they talk to each other; used from the background thread.
        layout: sizes that opaque state depends on, ``{"replicas": 2, "shard": 4}``; kept in the manifest.
        keep: how many of the newest steps stay.
        keep_every: multiples of this stay as well; 0 for none.
        timeout_s: how long to wait for another rank's files.
        file_bytes: a rank's file is split above this size (a single larger tensor stays in one file).

    Raises ``CheckpointError`` if the folder cannot be made or cleaned of what a killed process left half written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        ranks: int,
        exchange: Exchange,
        layout: Mapping[str, int],
        keep: int = 3,
        keep_every: int = 0,
        timeout_s: float = 600.0,
        file_bytes: int = 4 << 30,
    ) -> None:
        self.folder = folder
        self._rank = rank
        self._layout = dict(layout)
        self._keep = keep
        self._keep_every = keep_every
        self._snapshot = Snapshot(rank, file_bytes)
        self._committer = Committer(folder, rank, ranks, exchange, timeout_s)
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []
        self.pinned: int | None = None
        """A step whose checkpoint stays."""
        self._error: BaseException | None = None
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                names.remove_stale(folder)
            except OSError as error:
                raise CheckpointError(disk.explain(error)) from None

    def save(self, step: int, tensors: Mapping[str, TensorState], values: Mapping[str, Json]) -> None:
        """Copy the state of ``step`` and write it in the background; waits for the save before to end.

        Args:
            step: what the checkpoint is called; a step that is saved already is refused (``set_aside_after``).
            tensors: by name, such as ``model/<parameter>`` and ``optimizer/<parameter>/exp_avg``; on this rank.
            values: what JSON gives back exactly (no tuples, no NaN); those of rank 0 are kept.

        Raises ``CheckpointError`` for the save before or an existing step, ``ValueError`` for a value that JSON would
        change.
        """
        self._join()
        path = self.folder / names.step_name(step)
        if path.exists():
            raise CheckpointError(
                f"step {step} is saved already at {path} and a checkpoint is never written over: resume from it with "
                f"checkpoint.resume={step}, or move it away"
            )
        kept = checked_values(values)
        started = time.perf_counter()
        entries, images = self._snapshot.take(tensors)
        content = Content(step, self._layout, kept, tensors.keys(), entries, images)
        snapshot_s = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write, args=(content, path, snapshot_s), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def poll(self) -> list[Saved]:
        """The saves that ended since the last call, without waiting. Raises the error of one that failed."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> list[Saved]:
        """Like ``poll``, after the save in progress has ended."""
        self._join()
        return self.poll()

    def set_aside_after(self, step: int) -> list[int]:
        """Leave the line of checkpoints after ``step``, to which the run goes back; called on rank 0 before it goes on.

        They are renamed to ``abandoned-step-...`` and returned, so that neither a later resume nor a save of the same
        number meets them, and deleted when the new line has passed them.
        """
        self._join()
        try:
            return names.set_aside_after(self.folder, step)
        except OSError as error:
            raise CheckpointError(disk.explain(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save in progress; its error is raised unless another one is on its way."""
        if kind is None:
            self._join()
        elif self._thread is not None:
            self._thread.join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, content: Content, path: Path, snapshot_s: float) -> None:
        started = time.perf_counter()
        try:
            self._committer.commit(content)
        except BaseException as error:  # raised in the training thread by _join
            self._error = error
            return
        rank_bytes = sum(len(image.body) for image in content.images)
        self._finished.append(Saved(content.step, path, rank_bytes, snapshot_s, time.perf_counter() - started))
        if self._rank == 0:
            retain(self.folder, content.step, keep=self._keep, keep_every=self._keep_every, pinned=self.pinned)
