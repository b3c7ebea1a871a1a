"""Shamir's secret sharing (1979): any ``threshold`` of the shares give the secret, fewer tell nothing of it.

A secret of 32 bytes is the value at 0 of a random polynomial of degree threshold - 1 over the integers modulo the
prime 2^521 - 1; share x is its value at x > 0.
"""

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**521 - 1
SECRET_BYTES = 32
_SHARE_BYTES = 66

Random = Callable[[int], bytes]
"""So many random bytes."""


def share(secret: bytes, places: Sequence[int], threshold: int, random: Random) -> dict[int, bytes]:
    """A share (66 bytes) for each of ``places``, which are 1 or more."""
    assert len(secret) == SECRET_BYTES and 1 <= threshold <= len(places) and min(places) > 0, (places, threshold)
    # 16 bytes more than the prime has: the bias of the remainder is below 2^-128.
    drawn = [int.from_bytes(random(_SHARE_BYTES + 16), "little") % PRIME for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "little"), *drawn]
    return {place: _value(coefficients, place).to_bytes(_SHARE_BYTES, "little") for place in places}


def reconstruct(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from ``threshold`` shares or more, by place; the first are used."""
    assert len(shares) >= threshold, (len(shares), threshold)
    points = [(place, int.from_bytes(value, "little")) for place, value in sorted(shares.items())[:threshold]]
    secret = 0
    for i, (x, y) in enumerate(points):
        above, below = 1, 1
        for j, (other, _) in enumerate(points):
            if i != j:
                above, below = above * -other % PRIME, below * (x - other) % PRIME
        secret = (secret + y * above * pow(below, -1, PRIME)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(SECRET_BYTES, "little")


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
