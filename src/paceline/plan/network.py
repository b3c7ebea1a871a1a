"""A link between replicas as two numbers, and how long exchanges take on it."""

import re
from dataclasses import dataclass
from typing import Self

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_LINK = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)/(\d+(?:\.\d+)?)(us|ms|s)")
EXAMPLE = "100mbit/25ms (bits a second, and the delay one way)"


@dataclass(frozen=True)
class Network:
    """What each replica can send, whoever to, and how long anything takes to arrive."""

    bits_per_s: float
    delay_s: float
    """One way."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``100mbit/25ms``; ``ValueError`` for anything else."""
        match = _LINK.fullmatch(text.strip().lower())
        if match is None or float(match[1]) == 0:
            raise ValueError(f"expected a link such as {EXAMPLE}")
        return cls(float(match[1]) * _UNITS[match[2]], float(match[3]) * _UNITS[match[4]])

    def seconds(self, n_bytes: float, delays: float) -> float:
        """To send so many bytes, and to wait for so many delays one after the other (``plan.wire``).

        Where several pieces are under way their bytes fill the pauses, and it is less (docs/log.md).
        """
        return 8 * n_bytes / self.bits_per_s + delays * self.delay_s
