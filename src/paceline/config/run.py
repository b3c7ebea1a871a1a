"""The whole config of a run."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import SerializeAsAny, ValidationError, model_validator

from paceline.config.options import STRATEGIES, Count, Natural, Options, choose, named, sentences, strategy_name
from paceline.config.sections import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EarlyStopConfig,
    EvaluateConfig,
    LayoutConfig,
    LossScaleConfig,
    ModelConfig,
    PerturbConfig,
    RegularisationConfig,
    SpikesConfig,
    TrackConfig,
    TrainConfig,
)
from paceline.config.sync import SyncOptions
from paceline.errors import ConfigError


class Config(Options):
    """The whole of a run."""

    model: ModelConfig | None = None
    """Left out only where Python code passes a module of its own."""
    data: DataConfig
    objective: SerializeAsAny[Options]
    optimizer: SerializeAsAny[Options]
    schedule: SerializeAsAny[Options]
    precision: Literal["auto", "fp32", "bf16", "bf16_pure", "fp16", "fp8"] = "auto"
    """``auto``: bf16 where the processor has the units, else fp32. bf16 and fp16 learn in fp32 masters of the weights;
    bf16_pure learns in bf16 itself, and rounds at random. fp8 is not built yet, and refused."""
    reduction: Literal["fp32", "bf16"] = "fp32"
    """In what gradients are summed over the ranks of a replica and over replicas. Sums over micro-batches are fp32."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    batch: BatchConfig = BatchConfig()
    layout: LayoutConfig = LayoutConfig()
    replicas: Count | tuple[Count, ...] = 1
    """Copies of the model that share each batch; of a hierarchy a list, innermost first: ``[4, 2]`` are two groups of
    four."""
    sync: SerializeAsAny[Options] | tuple[SerializeAsAny[Options], ...]
    train: TrainConfig
    average: SerializeAsAny[Options]
    perturb: PerturbConfig | None = None
    spikes: SpikesConfig | None = None
    early_stop: EarlyStopConfig | None = None
    regularisation: RegularisationConfig = RegularisationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: TrackConfig = TrackConfig()
    seed: Natural = 0
    """Of the initial weights, the data order, and everything else that is drawn."""

    @model_validator(mode="after")
    def _same_levels(self) -> Self:
        levels = len(self.replicas) if isinstance(self.replicas, tuple) else 1
        if levels != len(self.syncs):
            raise ValueError(
                f"replicas has {levels} level(s) and sync {len(self.syncs)}; expected as many: sync: [all_reduce, "
                "diloco] goes with replicas: [4, 2]"
            )
        return self

    @property
    def syncs(self) -> tuple[SyncOptions, ...]:
        """How replicas agree at each level, innermost first."""
        levels: Any = self.sync
        return levels if isinstance(levels, tuple) else (levels,)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many replicas, or groups of the level below, agree at each level."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas,)

    @property
    def keeps_equal(self) -> bool:
        """Whether all replicas hold the same training state after every step."""
        return all(sync.keeps_equal for sync in self.syncs)

    @property
    def is_exact(self) -> bool:
        """Whether all replicas learn what one process with the whole batch would."""
        return all(sync.is_exact for sync in self.syncs)

    @property
    def keeps_own(self) -> bool:
        """Whether each replica has something of its own to save."""
        differs = not self.keeps_equal and not self.is_elastic  # else all hold the same where weights are saved
        return differs or any(sync.keeps_own for sync in self.syncs)

    @property
    def is_elastic(self) -> bool:
        """Whether a run goes on without a replica that is gone, unless it is the first."""
        return any(sync.is_elastic for sync in self.syncs)

    @property
    def in_rounds(self) -> bool:
        """Whether a step is a round: clients take steps of their own, one after the other, at each replica."""
        return any(sync.in_rounds for sync in self.syncs)

    @property
    def learning_alone(self) -> str:
        """The sync that lets replicas differ, as the config spells it; there is one."""
        return next(f"sync={strategy_name(sync)}" for sync in self.syncs if not sync.keeps_equal)

    @property
    def all_replicas(self) -> int:
        """Replicas of all levels together."""
        return math.prod(self.group_sizes)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Self:
        """Validate a tree of plain values; raise one ``ConfigError`` that lists every problem."""
        problems: list[str] = []
        values = dict(tree)
        for key, (table, default) in STRATEGIES.items():
            try:
                value = values.get(key, default)
                levels = key == "sync" and isinstance(value, list | tuple) and len(value) > 0
                values[key] = tuple(choose(table, level) for level in value) if levels else choose(table, value)
            except ConfigError as error:
                problems += error.problems
                values[key] = Options()  # stands in, so that the other sections are still checked
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problems += sentences(error, cls, ())
        if problems:
            raise ConfigError(problems)
        return config

    def tree(self) -> dict[str, Any]:
        """The resolved config as plain values; ``parse(tree())`` gives an equal config."""
        values = self.model_dump(mode="json")
        for key in STRATEGIES.keys() - {"sync"}:
            values[key] = named(getattr(self, key))
        values["sync"] = [named(sync) for sync in self.sync] if isinstance(self.sync, tuple) else named(self.sync)
        return values
