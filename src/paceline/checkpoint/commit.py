"""How the ranks of a save make one checkpoint of their files, or none.

    rank 0                                    every rank
    makes a hidden folder, posts its name  -> writes and syncs its files there,
    collects that from all                 <- posts what it wrote, or why it could not
    writes the manifest, syncs, renames
    the folder to its step, posts the end  -> learns how it ended

The rename is the one moment at which a checkpoint becomes visible. If anything fails on any rank, the hidden folder is
removed, all ranks raise the same error, and what was saved before is as it was.
"""

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

import paceline
from paceline.checkpoint import disk, manifest
from paceline.checkpoint.exchange import Exchange
from paceline.checkpoint.folder import newest, step_name, writing_name
from paceline.checkpoint.manifest import Entry, FileRecord, Json, Manifest
from paceline.checkpoint.snapshot import Image
from paceline.errors import CheckpointError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Content:
    """What one rank brings to a save; ``values`` count on rank 0."""

    step: int
    layout: Mapping[str, int]
    values: Mapping[str, Json]
    names: Collection[str]
    """All that this rank holds, whoever writes it."""
    entries: Mapping[str, Entry]
    images: Sequence[Image]


class _Message(BaseModel):
    """What ranks tell each other: an error, or what the moment asks for."""

    model_config = ConfigDict(frozen=True)

    step: int
    error: str | None = None
    folder: str = ""
    names: tuple[str, ...] = ()
    entries: dict[str, Entry] = {}
    files: dict[str, FileRecord] = {}


class Committer:
    """One rank's part in the saves of a run, one after the other."""

    def __init__(self, folder: Path, rank: int, ranks: int, exchange: Exchange, timeout_s: float) -> None:
        self._folder = folder
        self._rank = rank
        self._ranks = ranks
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._saves = 0
        self._read_by_all: list[str] = []  # own keys that nobody will ask for once this rank is told of the next save

    def commit(self, content: Content) -> None:
        """Write the content and publish the step; ``CheckpointError``, the same on every rank, if it did not work."""
        self._saves += 1
        end = self._lead(content) if self._rank == 0 else self._follow(content)
        if end.error:
            before = newest(self._folder)
            state = "no step is saved" if before is None else f"the newest complete step is {before}"
            raise CheckpointError(f"step {content.step} was not saved ({state}): {end.error}")

    def _lead(self, content: Content) -> _Message:
        hidden = self._folder / writing_name(content.step)
        begin = _attempt(content.step, lambda: self._begin(content.step, hidden))
        self._post("begin", begin)
        if begin.error:
            return begin
        self._post("written", _attempt(content.step, lambda: _write(content, begin, self._folder)))
        end = _attempt(content.step, lambda: self._publish(content, hidden))
        if end.error:
            shutil.rmtree(hidden, ignore_errors=True)  # what cannot be removed now is stale at the next start
        self._post("end", end)
        return end

    def _follow(self, content: Content) -> _Message:
        begin = _attempt(content.step, lambda: self._collect("begin", 1)[0])
        if begin.error:
            return begin
        self._post("written", _attempt(content.step, lambda: _write(content, begin, self._folder)))
        end = _attempt(content.step, lambda: self._collect("end", 1)[0])
        self._discard_read()
        return end if end.error else _attempt(content.step, lambda: _checked(content, end))

    def _begin(self, step: int, hidden: Path) -> _Message:
        if hidden.exists():
            shutil.rmtree(hidden)
        hidden.mkdir()
        return _Message(step=step, folder=hidden.name)

    def _publish(self, content: Content, hidden: Path) -> _Message:
        shares = self._collect("written", self._ranks)
        self._discard_read()
        errors = [f"rank {rank}: {share.error}" for rank, share in enumerate(shares) if share.error]
        if errors:
            return _Message(step=content.step, error="; ".join(errors))
        tensors = manifest.merge(share.entries for share in shares)
        end = _checked(content, _Message(step=content.step, names=tuple(tensors)))
        complete = Manifest(
            format=manifest.FORMAT,
            step=content.step,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            paceline=paceline.__version__,
            torch=torch.__version__,
            layout=dict(content.layout),
            values=dict(content.values),
            tensors=tensors,
            files={name: record for share in shares for name, record in share.files.items()},
        )
        disk.write_file(hidden / manifest.NAME, [complete.text().encode()])
        disk.sync_folder(hidden)
        final = self._folder / step_name(content.step)
        os.rename(hidden, final)
        try:
            disk.sync_folder(self._folder)
        except OSError:
            os.rename(final, hidden)
            raise
        return end

    def _post(self, moment: str, message: _Message) -> None:
        key = f"save-{self._saves}/{moment}/{self._rank}"
        self._exchange.post(key, message.model_dump_json())
        self._read_by_all.append(key)

    def _collect(self, moment: str, n: int) -> list[_Message]:
        texts = self._exchange.collect(f"save-{self._saves}/{moment}", n, self._timeout_s)
        return [_Message.model_validate_json(text) for text in texts]

    def _discard_read(self) -> None:
        """Forget this rank's keys; called when the others have shown that they are past reading them.

        For rank 0 that is when all have written (they know the folder and how the save before ended), for the others
        when rank 0 has ended the save.
        """
        for key in self._read_by_all:
            self._exchange.discard(key)
        self._read_by_all.clear()


def _write(content: Content, begin: _Message, folder: Path) -> _Message:
    if begin.step != content.step:
        raise ValueError(f"it saves step {content.step} while rank 0 saves step {begin.step}")
    hidden = folder / begin.folder
    files = {image.name: disk.write_file(hidden / image.name, [image.header, image.body]) for image in content.images}
    return _Message(step=content.step, entries=dict(content.entries), files=files)


def _checked(content: Content, end: _Message) -> _Message:
    """A name that each of its holders leaves to another is in nobody's message; so each rank looks for its own."""
    lost = sorted(set(content.names) - set(end.names))
    if lost:
        raise ValueError(f"it lacks {lost[0]}, for its holders each take another one for its writer")
    return end


def _attempt(step: int, work: Callable[[], _Message]) -> _Message:
    """Whatever goes wrong on a rank must reach the others as a message, or they would wait for it."""
    try:
        return work()
    except (TimeoutError, ValueError) as error:
        return _Message(step=step, error=str(error))
    except OSError as error:
        return _Message(step=step, error=disk.explain(error))
    except Exception as error:
        _log.exception("saving step %d", step)
        return _Message(step=step, error=f"{type(error).__name__}: {error}")
