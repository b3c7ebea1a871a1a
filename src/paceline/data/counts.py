"""How much data there is."""

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much there is to learn from and to measure on; of pairs, bytes and tokens of both texts."""

    documents: int
    bytes: int
    """UTF-8 bytes of the text."""
    tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    empty: int
    """Documents of nothing but white space, left out."""
    quarantined: int
    """Rows that could not be used, left out."""


@dataclass(frozen=True, kw_only=True)
class Statistics(Counts):
    """Counts of all sources together, and of each."""

    by_source: tuple[Counts, ...]
    """In the order of the config."""
    quarantine: Path | None
    """The file that keeps the rows that could not be used, each with its reason; None if there are none."""

    @classmethod
    def of(cls, by_source: tuple[Counts, ...], quarantine: Path) -> "Statistics":
        """Sum up the sources; ``quarantine`` is the file of the rows that could not be used, if there are any."""
        total = {field.name: sum(getattr(counts, field.name) for counts in by_source) for field in fields(Counts)}
        return cls(**total, by_source=by_source, quarantine=quarantine if total["quarantined"] else None)
