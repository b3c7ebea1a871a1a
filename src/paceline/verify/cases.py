"""Which layouts are tried, from the words of the command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from paceline.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    Count,
    EvaluateConfig,
    LayoutConfig,
    Options,
    RegularisationConfig,
    SyncOptions,
    TrainConfig,
)
from paceline.errors import ConfigError, PlanError
from paceline.optim.average import NoAverage
from paceline.optim.constant import Constant
from paceline.optim.ema import Ema
from paceline.optim.linear import Linear
from paceline.optim.sgd import SGD
from paceline.plan.layout import AXES, Grid

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
    "accumulate=15",
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

MIXTURE = (
    "shard=2,expert=2",
    "context=2,expert=2",
    "shard=4,expert=2,zero=1",
    "shard=4,expert=2,zero=2",
    "shard=4,expert=4",
    "shard=2,expert=2,recompute=full,accumulate=3",
    "replicas=2,shard=2,expert=2",
    "shard=2,expert=2,tensor=2",
    "shard=2,expert=2,tensor=2,sequence=true",
    "shard=2,context=2,expert=4",
    "pipeline=2,shard=2,expert=2,schedule=1f1b",
    "pipeline=2,shard=2,expert=2,schedule=zbv,zero=2",
)
"""What mixtures of experts alone can do."""

SEQUENCES = 15
"""Of a step: no number of ranks divides it, and every schedule has enough for its micro-batches."""
SEQUENCE_TOKENS = 23
RATE = 0.2
MOMENTUM = 0.5
CLIP_NORM = 1.0
CLIP_BLOCK_NORM = 0.2
"""Some blocks of a small model are above it, and some below."""
CLIP_VALUE = 0.02
BUCKET_MIB = 0.01

_COUNT: TypeAdapter[int] = TypeAdapter(Count)
_TRUTH: TypeAdapter[bool] = TypeAdapter(bool)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to share the work."""

    layout: LayoutConfig
    replicas: int = 1
    accumulate: int | None = None
    """Micro-batches a step on each rank."""
    compiled: bool = False

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

    def config(
        self, base: Config, *, steps: int, output: Path, resumed: bool = False, optimizer: Options | None = None
    ) -> Config:
        """The run of this case, or the part of it after it was ``resumed``, as a user would write it.

        All is such that a mistake shows: SGD hides no wrong scale, and its momentum goes through the checkpoints, as
        does an average of the weights, which is what is evaluated; the rate changes from step to step; clipping is
        active, also by value and by block where the config asks for that; gradients travel in several buckets. Without
        a word of its own a case takes two micro-batches a step, and one after it was resumed. An ``optimizer`` that is
        on trial in place of SGD has the rate that it was given, and neither clipping nor penalties: it is to see the
        same gradients, bit for bit.
        """
        given: Any = optimizer
        patterns = base.layout.tensor_patterns if self.layout.tensor > 1 else None
        return base.model_copy(
            update={
                "layout": self.layout.model_copy(update={"tensor_patterns": patterns}),
                **self._agreement(base),
                "batch": BatchConfig(
                    sequences=SEQUENCES, sequence_tokens=SEQUENCE_TOKENS, micro=self._micro(1 if resumed else 2)
                ),
                "optimizer": optimizer or SGD(lr=RATE, momentum=MOMENTUM),
                "schedule": Constant(warmup_steps=2) if given and given.schedule else Linear(warmup_steps=2),
                "average": NoAverage() if given and given.averages else Ema(decay=0.5),
                "perturb": None,
                "spikes": None,
                "early_stop": None,
                "regularisation": RegularisationConfig() if optimizer else base.regularisation,
                "train": TrainConfig(
                    steps=steps,
                    output=str(output),
                    clip_norm=None if optimizer else CLIP_NORM,
                    clip_block_norm=CLIP_BLOCK_NORM if base.train.clip_block_norm and not optimizer else None,
                    clip_value=CLIP_VALUE if base.train.clip_value and not optimizer else None,
                    compile=self.compiled,
                ),
                "checkpoint": CheckpointConfig(every=steps // 2),
                "evaluate": EvaluateConfig(every=steps // 2),
            }
        )

    def _agreement(self, base: Config) -> dict[str, Any]:
        """Replicas and how they agree: in several buckets, and often."""
        syncs = tuple(_often(sync) for sync in base.syncs)
        if len(syncs) == 1:
            return {"replicas": self.replicas, "sync": syncs[0]}
        if self.replicas == base.all_replicas:
            return {"replicas": base.replicas, "sync": syncs}
        if self.replicas == 1:
            return {"replicas": 1, "sync": syncs[-1]}
        raise PlanError(
            f"replicas={self.replicas} are not the levels of replicas={list(base.group_sizes)}; use "
            f"replicas={base.all_replicas}, or 1"
        )

    def _micro(self, accumulate: int) -> int | None:
        """Sequences of a micro-batch; None where the plan is to choose, as it does for pipelines."""
        if self.layout.pipeline > 1:
            return 1 if self.accumulate else None
        share = -(-SEQUENCES // (self.replicas * self.layout.shard))
        return -(-share // (self.accumulate or accumulate))

    @property
    def name(self) -> str:
        """As the command line spells it."""
        given = self.layout.model_dump(exclude_defaults=True, exclude={"tensor_patterns"})
        given |= {"replicas": self.replicas} if self.replicas > 1 else {}
        given |= {"accumulate": self.accumulate} if self.accumulate else {}
        given |= {"compile": True} if self.compiled else {}
        return ",".join(f"{key}={str(value).lower()}" for key, value in given.items()) or "one process"


def _often(sync: SyncOptions) -> Options:
    """The strategy with small buckets, and with all it does in the steps before a checkpoint and after it."""
    most = {"bucket_mib": BUCKET_MIB, "every": 3, "start": 4, "exact_steps": 2}
    if not sync.is_exact:
        del most["bucket_mib"]  # there are none
    return sync.model_copy(update={key: min(getattr(sync, key), n) for key, n in most.items() if hasattr(sync, key)})


def parse(text: str) -> list[Case]:
    """``shard=2,tensor=2; pipeline=4,schedule=zbv``, ``all`` or ``pairs``; ``ConfigError`` for anything else."""
    if text == "all":
        return [_case(words) for words in (*SINGLE, *TOGETHER, *MIXTURE)]
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
        replicas = _COUNT.validate_python(values.pop("replicas", 1))
        accumulate = _COUNT.validate_python(values.pop("accumulate")) if "accumulate" in values else None
        compiled = _TRUTH.validate_python(values.pop("compile", False))
        return Case(layout=LayoutConfig(**values), replicas=replicas, accumulate=accumulate, compiled=compiled)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "replicas, accumulate or compile"
        raise ConfigError(f"layouts: {words.strip()!r}: {where}: {first['msg'].lower()}") from None


def _pairs() -> Iterator[str]:
    """All pairs of single things that do not set the same key to different values."""
    for one, other in combinations(SINGLE, 2):
        first, second = (dict(word.split("=") for word in words.split(",")) for words in (one, other))
        if all(first[key] == second[key] for key in first.keys() & second.keys() - {"zero"}) and not (
            first.keys() & second.keys() & {"replicas", *AXES}
        ):
            yield ",".join(f"{key}={value}" for key, value in (first | second).items())
