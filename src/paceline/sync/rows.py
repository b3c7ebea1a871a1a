"""The syncs that are measured against each other: what a new one costs in quality is one line here and a run.

``make sync-table`` trains each and writes ``measured.json``; ``benchmarks/wan.py --preset`` runs them on a slow link.
"""

from typing import Any

ROWS: dict[str, Any] = {
    "all_reduce": "all_reduce",
    "local_sgd 10": {"name": "local_sgd", "every": 10},
    "local_sgd 100": {"name": "local_sgd", "every": 100},
    "post_local_sgd 10": {"name": "post_local_sgd", "start": 100, "every": 10},
    "slowmo 10": {"name": "slowmo", "every": 10},
    "diloco 10": {"name": "diloco", "every": 10},
    "diloco 30": {"name": "diloco", "every": 30},
    "diloco 100": {"name": "diloco", "every": 100},
}
"""By the name in the table: what stands in a config after ``sync:``."""

PRESETS: dict[str, tuple[str, ...]] = {
    "quick": ("all_reduce", "diloco 100"),
    "all": tuple(ROWS),
}
