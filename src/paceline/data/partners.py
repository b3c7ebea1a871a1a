"""Which other sample of its step a sample is mixed with: a function of the seed and the step's samples alone."""

import numpy as np

from paceline.data.permute import Permutation
from paceline.data.rows import Ints


def partners(first: int, count: int, seed: int) -> Ints:
    """Of samples ``first`` to ``first + count - 1`` the partner of each, (count,).

    They stand in a ring, in an order that is permuted anew for each step, and the partner of each is the next one. So
    each is the partner of one, and none is its own where there are two or more.
    """
    ring = Permutation(count, (seed, "partners", first))(np.arange(count))
    found = np.empty(count, np.int64)
    found[ring] = np.roll(ring, -1)
    return first + found
