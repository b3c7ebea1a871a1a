"""Which layouts are tried, from the words of the command line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from paceline.config import BatchConfig, Count, LayoutConfig
from paceline.data.rows import Row
from paceline.errors import ConfigError, PlanError
from paceline.plan.batch import plan_batch
from paceline.plan.layout import AXES, Grid, check_offload
from paceline.plan.stages import check_schedule

SINGLE = (
    "replicas=2",
    "shard=2,zero=1",
    "shard=2,zero=2",
    "shard=2,zero=3",
    "shard=2,offload=true",
    "tensor=2",
    "tensor=2,sequence=true",
    "context=2,attention=ring",
    "context=2,attention=ulysses",
    "pipeline=2,schedule=gpipe",
    "pipeline=2,schedule=1f1b",
    "pipeline=2,schedule=interleaved1f1b",
    "pipeline=2,schedule=looped_bfs",
    "pipeline=2,schedule=interleaved_zero_bubble,zero=2",
    "pipeline=2,schedule=zbv,zero=2",
    "pipeline=2,schedule=dualpipev,zero=2",
    "recompute=selective",
    "recompute=full",
    "accumulate=3",
)
"""One thing at a time: what ``all`` tries first, and ``pairs`` combines."""

TOGETHER = (
    "shard=4,zero=3",
    "tensor=4",
    "tensor=4,sequence=true",
    "context=4,attention=ring",
    "context=4,attention=ulysses",
    "pipeline=4,schedule=1f1b",
    "replicas=2,shard=2,tensor=2",
    "replicas=2,tensor=2,sequence=true,recompute=full",
    "shard=2,tensor=2,context=2,recompute=selective",
    "shard=2,tensor=2,pipeline=2,zero=2,schedule=1f1b",
    "replicas=2,context=2,pipeline=2,schedule=gpipe",
    "tensor=2,context=2,pipeline=2,schedule=1f1b,accumulate=3",
)
"""Triples and quadruples that people use."""


_COUNT: TypeAdapter[int] = TypeAdapter(Count)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to share the work."""

    layout: LayoutConfig
    replicas: int = 1
    accumulate: int = 1
    """At least this many micro-batches a step on each rank."""

    @property
    def grid(self) -> Grid:
        """The ranks of one replica."""
        return Grid.of(self.layout)

    @property
    def ranks(self) -> int:
        """Ranks of all replicas; 0 for a layout that cannot be."""
        try:
            return self.replicas * self.grid.ranks
        except PlanError:
            return 0

    def check(self) -> None:
        """Raise ``PlanError`` for a layout that no model can have."""
        data_parallel = self.replicas * self.grid.shard
        check_offload(self.layout, self.replicas)
        one_each = BatchConfig(sequences=2 * self.layout.pipeline * data_parallel, sequence_tokens=1, micro=1)
        check_schedule(self.layout, plan_batch(one_each, data_parallel), compiled=False)

    def share(self, rows: Sequence[Row], rank: int, ranks: int) -> list[list[Row]]:
        """The micro-batches of one data-parallel rank; the same number on each, filled up with rows of zero weight.

        A pipeline gets single rows, and as many as any schedule asks for.
        """
        places = -(-len(rows) // ranks)
        micro = 1 if self.layout.pipeline > 1 else max(1, places // self.accumulate)
        round_ = 2 * self.layout.pipeline if self.layout.pipeline > 1 else 1
        count = -(-places // (micro * round_)) * round_
        own = list(rows[rank::ranks])
        own += [replace(own[0], sequence=10**6 + i, weight=0.0) for i in range(count * micro - len(own))]
        return [own[i : i + micro] for i in range(0, len(own), micro)]

    @property
    def name(self) -> str:
        """As the command line spells it."""
        given = self.layout.model_dump(exclude_defaults=True)
        given |= {key: n for key in ("replicas", "accumulate") if (n := getattr(self, key)) > 1}
        return ",".join(f"{key}={str(value).lower()}" for key, value in given.items()) or "one process"


def parse(text: str) -> list[Case]:
    """``shard=2,tensor=2; pipeline=4,schedule=zbv``, ``all`` or ``pairs``; ``ConfigError`` for anything else."""
    if text == "all":
        return [_case(words) for words in (*SINGLE, *TOGETHER)]
    if text == "pairs":
        return list({case.name: case for case in map(_case, _pairs())}.values())
    return [_case(words) for words in text.split(";") if words.strip()]


def _case(words: str) -> Case:
    values: dict[str, Any] = {}
    for word in words.split(","):
        key, equals, value = word.strip().partition("=")
        if not equals:
            raise ConfigError(f"layouts: {word.strip()!r} in {words.strip()!r}: expected key=value, such as shard=2")
        values[key] = yaml.safe_load(value)
    try:
        replicas, accumulate = (_COUNT.validate_python(values.pop(key, 1)) for key in ("replicas", "accumulate"))
        return Case(layout=LayoutConfig(**values), replicas=replicas, accumulate=accumulate)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "replicas or accumulate"
        raise ConfigError(f"layouts: {words.strip()!r}: {where}: {first['msg'].lower()}") from None


def _pairs() -> Iterator[str]:
    """All pairs of single things that do not set the same key to different values."""
    for one, other in combinations(SINGLE, 2):
        first, second = (dict(word.split("=") for word in words.split(",")) for words in (one, other))
        if all(first[key] == second[key] for key in first.keys() & second.keys() - {"zero"}) and not (
            first.keys() & second.keys() & {"replicas", *AXES}
        ):
            yield ",".join(f"{key}={value}" for key, value in (first | second).items())
