"""Random numbers that belong to a row, not to the process that draws them."""

import numpy as np


def row_generator(seed: int, step: int, sequence: int) -> np.random.Generator:
    """A stream of random numbers that is a function of (seed, step, sequence) alone.

    Philox is a keyed bijection of a 256-bit counter: the seed makes the key, step and sequence the upper half of the
    counter, so that no two streams meet within 2^128 draws.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed), counter=[0, 0, sequence, step]))
