"""Early stopping: a run ends when its held-out loss no longer falls, with the weights that had the best one."""

from collections.abc import Mapping
from typing import Any

from paceline.config import EarlyStopConfig


class EarlyStop:
    """Watches the held-out losses of ``evaluate.every``, which are the same on all ranks; without a config nothing."""

    def __init__(self, config: EarlyStopConfig | None) -> None:
        self._config = config
        self._least_loss: float | None = None
        self._worse = 0
        self.best: int | None = None
        """The step with the best held-out loss so far; None before the first."""

    @property
    def is_over(self) -> bool:
        """Whether so many measurements in a row were no better that the run ends."""
        return self._config is not None and self._worse >= self._config.patience

    def observe(self, step: int, loss: float) -> bool:
        """Take a held-out loss; whether it is the best so far. One that is not a number never is."""
        if self._config is None:
            return False
        if self._least_loss is None or loss < self._least_loss - self._config.least:
            self._least_loss, self.best, self._worse = loss, step, 0
            return True
        self._worse += 1
        return False

    def words(self, step: int) -> str:
        """Why the run ended after ``step``."""
        assert self._config is not None
        return (
            f"no better held-out loss than {self._least_loss:.4g} of step {self.best} in {self._config.patience} "
            f"measurements: ended after step {step}"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"least_loss": self._least_loss, "best": self.best, "worse": self._worse}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's."""
        if self._config is not None and state is not None:
            self._least_loss, self.best, self._worse = state["least_loss"], state["best"], state["worse"]
