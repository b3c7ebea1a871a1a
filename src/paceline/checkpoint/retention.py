"""Which checkpoints stay."""

import logging
from collections.abc import Sequence
from pathlib import Path

from paceline.checkpoint import folder as names

_log = logging.getLogger(__name__)


def surplus(steps: Sequence[int], *, keep: int, keep_every: int, pinned: int | None = None) -> list[int]:
    """The steps that go: all but the newest ``keep`` (at least 1), the multiples of ``keep_every`` (0: none) and the
    ``pinned`` one."""
    assert min(keep - 1, keep_every) >= 0, f"keep={keep}, keep_every={keep_every}"
    return [step for step in sorted(steps)[:-keep] if step != pinned and not (keep_every and step % keep_every == 0)]


def retain(folder: Path, saved: int, *, keep: int, keep_every: int, pinned: int | None = None) -> None:
    """Delete what is surplus once ``saved`` is complete, and what it has overtaken of an abandoned line.

    A folder that cannot be deleted (somebody reads it over a network disk) is a warning, not the end of a run; the next
    save or start tries again.
    """
    try:
        names.remove_stale(folder)
        for step in surplus(names.steps(folder), keep=keep, keep_every=keep_every, pinned=pinned):
            names.remove(folder, names.step_name(step), step)
        names.remove_abandoned(folder, saved)
    except OSError as error:
        _log.warning("cannot remove an old checkpoint: %s", error)
