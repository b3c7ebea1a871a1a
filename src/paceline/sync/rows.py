"""The syncs that are measured against each other: what a new one costs in quality is one line here and a run.

``make sync-table`` trains each and writes ``measured.json``; ``benchmarks/wan.py --preset`` runs them on a slow link.
"""

from typing import Any

ROWS: dict[str, Any] = {
    "all_reduce": "all_reduce",
    "all_reduce bf16": {"name": "all_reduce", "reducer": "bf16"},
    "all_reduce int8": {"name": "all_reduce", "reducer": "int8"},
    "all_reduce int4": {"name": "all_reduce", "reducer": "int4"},
    "all_reduce sign": {"name": "all_reduce", "reducer": "sign"},
    "all_reduce topk": {"name": "all_reduce", "reducer": "topk"},
    "all_reduce dct_topk": {"name": "all_reduce", "reducer": "dct_topk"},
    "all_reduce powersgd": {"name": "all_reduce", "reducer": {"name": "powersgd", "rank": 4}},
    "local_sgd 10": {"name": "local_sgd", "every": 10},
    "local_sgd 100": {"name": "local_sgd", "every": 100},
    "post_local_sgd 10": {"name": "post_local_sgd", "start": 100, "every": 10},
    "slowmo 10": {"name": "slowmo", "every": 10},
    "diloco 10": {"name": "diloco", "every": 10},
    "diloco 30": {"name": "diloco", "every": 30},
    "diloco 30 int8": {"name": "diloco", "every": 30, "reducer": "int8"},
    "diloco 30 int4": {"name": "diloco", "every": 30, "reducer": "int4"},
    "diloco 100": {"name": "diloco", "every": 100},
    "diloco 100 int8": {"name": "diloco", "every": 100, "reducer": "int8"},
    "diloco 100 int4": {"name": "diloco", "every": 100, "reducer": "int4"},
    "streaming 100": {"name": "streaming_diloco", "every": 100, "fragments": 2, "delay": 10},
    "streaming 100 int8": {"name": "streaming_diloco", "every": 100, "fragments": 2, "delay": 10, "reducer": "int8"},
    "streaming 100 int4": {"name": "streaming_diloco", "every": 100, "fragments": 2, "delay": 10, "reducer": "int4"},
    "gossip 30": {"name": "gossip", "every": 30},
    "gossip 100": {"name": "gossip", "every": 100},
    "partial 10": {"name": "partial", "every": 10},
    "async_local_sgd 30": {"name": "async_local_sgd", "every": 30, "dynamic_steps": False},
    "parameter_server": "parameter_server",
    "parameter_server stale 1": {"name": "parameter_server", "mode": "stale", "staleness": 1},
    "parameter_server async": {"name": "parameter_server", "mode": "async"},
}
"""By the name in the table: what stands in a config after ``sync:``."""

PRESETS: dict[str, tuple[str, ...]] = {
    "quick": ("all_reduce", "diloco 100"),
    "all": tuple(ROWS),
}
