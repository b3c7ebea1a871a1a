"""The table that ``wan.py`` prints."""

from dataclasses import dataclass

from meter import Probe


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a sync took; bytes and times are of a step, mean over those that are timed."""

    sync: str
    step_s: float
    compute: float
    """Share of that."""
    compute_s: float
    """Median."""
    wire_bytes: float
    payload_bytes: float
    modelled_s: float | None
    end_s: float
    """Of the run's last step, which ends with an exchange of everything."""
    loss: float
    probe: Probe
    dropped: int
    late_s: float


COLUMNS = {
    "sync": 34,
    "ms/step": 9,
    "compute": 9,
    "ms": 7,
    "wire KiB": 10,
    "payload KiB": 13,
    "wire/payload": 14,
    "model ms": 10,
    "end ms": 9,
    "loss": 8,
    "dropped": 9,
    "late ms": 9,
}


def line_of(result: Result | None = None) -> str:
    """A row of the table, or its head."""
    cells = list(COLUMNS)
    if result is not None:
        cells = [
            result.sync,
            f"{1e3 * result.step_s:.1f}",
            f"{result.compute:.1%}",
            f"{1e3 * result.compute_s:.1f}",
            f"{result.wire_bytes / 1024:,.1f}",
            f"{result.payload_bytes / 1024:,.1f}",
            f"{result.wire_bytes / max(1, result.payload_bytes):.4f}",
            f"{1e3 * result.modelled_s:.1f}" if result.modelled_s is not None else "-",
            f"{1e3 * result.end_s:.1f}",
            f"{result.loss:.4f}",
            str(result.dropped),
            f"{1e3 * result.late_s:.1f}",
        ]
    first, *others = zip(cells, COLUMNS.values(), strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)
