"""Buckets: many small tensors sent as a few large ones."""

from collections.abc import Sequence


def bucketed(numels: Sequence[int], most: int) -> list[list[int]]:
    """Indices of tensors grouped into buckets of about ``most`` elements, last tensor first.

    Every tensor stands in exactly one bucket; one larger than ``most`` has a bucket of its own.
    """
    buckets: list[list[int]] = []
    room = 0
    for index in reversed(range(len(numels))):
        if numels[index] > room or not buckets:
            buckets.append([])
            room = most
        buckets[-1].append(index)
        room -= numels[index]
    return buckets


def elements(mib: float) -> int:
    """How many fp32 elements are a bucket of ``mib`` MiB."""
    return max(1, int(mib * 2**20 / 4))
