"""What happens after a step: go on, evaluate, save, stop. A function of the step and of what all ranks agreed."""

import signal
import threading
from dataclasses import dataclass
from typing import Any

from paceline.config import Config


@dataclass(frozen=True, kw_only=True)
class After:
    """What to do after a step."""

    evaluate: bool
    save: bool
    stop: bool


class StopRequest:
    """Set by SIGTERM (the launcher sends it on Ctrl-C): finish the step, save, exit.

    The request of one rank becomes the decision of all in the step's sums, so that all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False

    def listen(self, *signals: signal.Signals) -> None:
        """Take the signals of this process; only its main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def after(config: Config, step: int, stop: bool) -> After:
    """What to do after ``step``; the last step is always measured, it and one after which all stop are always saved.

    Who is asked to stop measures no more, unless the rate of the steps to come follows from it.
    """
    last = step == config.train.steps
    schedule: Any = config.schedule
    waits = not stop or schedule.measures == "held_out"
    return After(
        evaluate=last or (waits and _due(step, config.evaluate.every)),
        save=last or stop or _due(step, config.checkpoint.every),
        stop=stop or last,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
