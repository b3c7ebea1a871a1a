"""Every error paceline raises on purpose.

    PacelineError                 anything the user can act on; one line, no traceback on the command line
    ├── ConfigError               the config file, an override or an argument is wrong
    ├── PlanError                 the parts of a config do not fit together
    ├── ModelError                the model cannot be built, read or used as asked
    ├── DataError                 the data cannot be read, or there is not enough of it
    ├── CheckpointError           a checkpoint is missing, damaged, of another run, or cannot be written
    ├── LinkError                 a message between ranks or replicas did not get through
    ├── WorkerError               a rank died or reported an error
    ├── TrainError                training cannot go on
    │   └── NonFiniteError        loss or gradient is not a finite number
    │       └── NonFiniteElsewhere    ... and it began on another rank
    └── MissingExtraError         an optional library is not installed

An error says what is wrong, with the value, what was expected, and how to mend it.
"""

from collections.abc import Iterable


class PacelineError(Exception):
    """Base of all errors that carry a message for the user."""

    exit_status = 1


class ConfigError(PacelineError):
    """One or more problems in a config; every problem stands on a line of its own."""

    exit_status = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class PlanError(PacelineError):
    """Parts of the config that are each right but do not fit together."""

    exit_status = 2


class ModelError(PacelineError):
    """The model cannot be built, read or used as asked."""


class DataError(PacelineError):
    """The data cannot be read, or there is not enough of it."""


class CheckpointError(PacelineError):
    """A checkpoint is missing, damaged, of another run, or cannot be written."""


class LinkError(PacelineError):
    """A message between ranks or replicas did not get through."""


class WorkerError(PacelineError):
    """A rank died or reported an error."""


class TrainError(PacelineError):
    """Training cannot go on."""


class NonFiniteError(TrainError):
    """Loss or gradient is not a finite number."""


class NonFiniteElsewhere(NonFiniteError):
    """Loss or gradient is not a finite number, and every value on this rank was: the cause is on another one."""


class MissingExtraError(PacelineError):
    """An optional library is not installed; the message names the extra that brings it."""
