"""What the loader hands to an objective: one row of tokens, and where rows come from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sample. Rows compare by identity: their arrays have no single truth value."""

    sequence: int
    """Place of the sample in the run's global order, from 0; all randomness of the sample is keyed by it."""
    tokens: Ints
    """(n,) token ids."""
    starts: Ints
    """(k,) ascending positions in ``tokens`` where a document begins; empty inside a long document."""
    target: Ints | None = None
    """(m,) token ids of the second column; paired data only."""
    weight: float = 1.0
    """0.0 for a row that only fills up a micro-batch and must not count."""
    partner: Ints | None = None
    """(l,) token ids of another row of the step, for objectives that mix rows; None for all others."""


class Rows(Protocol):
    """The rows of one source, by number; the same number always gives the same row."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def row(self, index: int, sequence: int) -> Row:
        """Row ``index`` (0 to len - 1), to be learned as sample ``sequence`` of the run."""
        ...
