"""Leaps of the loss: when a loss is one, and how often a run has gone back because of one.

A loss is compared with the last ``window`` losses that did not leap themselves, by ``track.curves.leaps``, as in the
report; one that is not a number leaps too. After ``patience`` leaps in a row the run goes back to the newest checkpoint
before the first of them, and the batches that it has seen since are left out (Chowdhery et al. 2022, PaLM, arXiv
2204.02311, section 5.1). The losses are the same on all ranks, and so is what they decide.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from paceline.config import SpikesConfig
from paceline.errors import TrainError
from paceline.track.curves import leaps


class Spikes:
    """Watches the losses of a run; never finds any where there is no config."""

    def __init__(self, config: SpikesConfig | None) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window if config else 0)
        self._in_a_row = 0
        self.undone: list[tuple[int, int, int]] = []
        """(step that the run went back to, first sequence that is left out, first that is not), of the whole run."""

    @property
    def is_on(self) -> bool:
        """Whether anything is watched."""
        return self._config is not None

    def observe(self, loss: float) -> bool:
        """Take the loss of a step; whether the run is to go back before the ``in_a_row`` newest steps."""
        if self._config is None:
            return False
        if not self._leaps(loss):
            self._in_a_row = 0
            self._losses.append(loss)
            return False
        self._in_a_row += 1
        return self._in_a_row >= self._config.patience or not math.isfinite(loss)

    @property
    def in_a_row(self) -> int:
        """How many of the newest losses leap."""
        return self._in_a_row

    def words(self, loss: float, step: int) -> str:
        """What was seen, for a person."""
        if not math.isfinite(loss):
            return f"the loss was {loss} at step {step}"
        return f"the loss leapt to {loss:.4g} at step {step}, from a median of {statistics.median(self._losses):.4g}"

    def forget(self) -> None:
        """Begin anew: the weights were moved otherwise than by learning."""
        self._losses.clear()
        self._in_a_row = 0

    def goes_back(self, step: int, first: int, until: int) -> None:
        """Note that the run goes back to ``step`` and leaves out sequences ``first`` to ``until - 1``.

        ``TrainError`` if it has been back there ``most`` times already.
        """
        assert self._config is not None
        self.undone.append((step, first, until))
        times = sum(to == step for to, _, _ in self.undone)
        if times > self._config.most:
            raise TrainError(
                f"the loss has leapt {times} times after step {step}, and spikes.most={self._config.most}: other "
                "batches do not help. Use a lower optimizer.lr, a longer warm-up, or train.clip_norm"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "undone": [list(one) for one in self.undone]}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's; what was undone since stays undone."""
        self.forget()
        if self._config is None or state is None:
            return
        self._losses.extend(state["losses"])
        self._in_a_row = state["in_a_row"]
        self.undone = max(self.undone, [tuple(one) for one in state["undone"]], key=len)

    def _leaps(self, loss: float) -> bool:
        assert self._config is not None
        if not math.isfinite(loss):
            return True
        is_known = len(self._losses) == self._config.window
        return is_known and leaps(loss, self._losses, self._config.threshold)
