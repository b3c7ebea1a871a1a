"""``paceline train --dry-run``: the whole plan in words and numbers, without starting a process."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from paceline.comm.device import cores, cpu_has_bf16_units, processor_name
from paceline.config import Config, strategy_name
from paceline.errors import ConfigError
from paceline.models.describe import describe
from paceline.objectives.base import holds_all_logits
from paceline.objectives.head_cross_entropy import rows_at_a_time
from paceline.plan.batch import BatchPlan
from paceline.plan.layout import Grid, data_rank
from paceline.plan.memory import RankMemory, rank_memory
from paceline.plan.model import ModelSizes
from paceline.plan.run import plan_run
from paceline.train.assemble import (
    check_positions,
    model_sizes,
    resolve_model,
    resolve_precision,
    wanted_vocabulary,
)
from paceline.verify.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config comes to."""

    config: Config
    model: ModelSizes
    vocabulary_is_open: bool
    batch: BatchPlan
    memory: RankMemory
    precision: str
    grid: Grid
    wire_bytes: tuple[float, ...]
    """Payload that each rank sends in a step on average, at each level of the sync."""
    logit_rows: int | None
    """How many rows of logits are there at once; None for all, or for a family with which this could not be tried."""

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        memory = {**asdict(self.memory), "states": self.memory.states, "total_estimate": self.memory.total_estimate}
        return {
            "config": self.config.tree(),
            "model": asdict(self.model),
            "batch": {**asdict(self.batch), "tokens": self.batch.tokens, "filling": self.batch.filling},
            "precision": self.precision,
            "ranks": [
                {"rank": rank, "replica": rank // self.grid.ranks, "does": self._duty(rank)}
                for rank in range(self.config.all_replicas * self.grid.ranks)
            ],
            "bytes_per_rank": memory,
            "wire_bytes_per_step": sum(self.wire_bytes),
            "logit_rows": self.logit_rows,
            "tokens_in_all": self.batch.tokens * self.config.train.steps,
        }

    def text(self) -> str:
        """For a person."""
        c, b, m = self.config, self.batch, self.memory
        open_note = " (the vocabulary follows the tokenizer)" if self.vocabulary_is_open else ""
        filling = f", {b.filling} place(s) filled with zero weight" if b.filling else ""
        lines = [
            f"model      {self.model.parameters:,} parameters in {self.model.tensors} tensors, "
            f"{self.model.layers} blocks{open_note}",
            f"batch      {b.sequences} sequences x {b.sequence_tokens} tokens = {b.tokens:,} tokens a step"
            f" = {b.data_parallel} rank(s) x {b.micro_batches} micro-batch(es) x {b.micro} sequence(s){filling}",
            f"run        {c.train.steps:,} steps, {b.tokens * c.train.steps:,} tokens, into {c.train.output}",
            f"precision  {self.precision} ({'asked' if c.precision != 'auto' else 'auto'}; this processor "
            f"{'has' if cpu_has_bf16_units() else 'has no'} bf16 units)",
            f"logits     {self._logits()}",
            f"optimizer  {strategy_name(c.optimizer)}, {strategy_name(c.schedule)} schedule",
            *self._syncs(),
            "",
            "bytes per rank",
            *(f"  {name:<34} {_bytes(size):>10}" for name, size in self._memory_rows()),
            f"  {'total, with the estimates':<34} {_bytes(m.total_estimate):>10}",
            "",
            "ranks",
            *(f"  rank {rank}  {self._duty(rank)}" for rank in range(c.all_replicas * self.grid.ranks)),
            "",
            f"this machine: {processor_name()}, {cores()} core(s)",
        ]
        return "\n".join(lines)

    def _syncs(self) -> list[str]:
        """A line for each level, innermost first."""
        levels = zip(self.config.syncs, self.config.group_sizes, self.wire_bytes, strict=True)
        things = ["replica(s)", *["group(s)"] * (len(self.wire_bytes) - 1)]
        return [
            f"sync       {strategy_name(sync)} over {size} {thing}, {_bytes(sent)} sent by each rank a step"
            + ("" if sync.keeps_equal else ", on average")  # type: ignore[attr-defined]
            for (sync, size, sent), thing in zip(levels, things, strict=True)
        ]

    def _logits(self) -> str:
        if self.logit_rows is None:
            return "all of a micro-batch at once (the model changes what its head gives, or could not be tried)"
        return f"at most {self.logit_rows} positions at a time"

    def _memory_rows(self) -> list[tuple[str, int]]:
        m = self.memory
        return [
            ("fp32 weights", m.master_weights),
            ("weights to compute with", m.compute_weights),
            ("fp32 gradients", m.gradients),
            ("optimizer state", m.optimizer),
            ("sync buffers", m.sync),
            ("activations (estimate)", m.activations_estimate),
            ("logits (estimate)", m.logits_estimate),
        ]

    def _duty(self, rank: int) -> str:
        batch, (replica, inside) = self.batch, divmod(rank, self.grid.ranks)
        place = self.grid.place(inside)
        first = data_rank(replica, self.config.group_sizes, place.shard)
        share = len(range(first, batch.sequences, batch.data_parallel))
        cuts = [f"{axis} {at + 1} of {size}" for axis, at, size in self.grid.cuts(inside)]
        part = ", ".join(cuts) or "the whole model"
        differs = not all(sync.keeps_equal for sync in self.config.syncs)  # type: ignore[attr-defined]
        own = "; writes its replica's part of a checkpoint" if differs else ""
        writes = "; writes metrics, checkpoints and the export" if rank == 0 else own
        return f"replica {replica}, {part}, {share} of {batch.sequences} sequences{writes}"


def explain(config: Config) -> Plan:
    """Resolve a config into its plan; raises what a run would raise before it starts."""
    source = resolve_model(config)
    if source is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    grid, batch = plan_run(config)
    check_positions(source, config.batch.sequence_tokens)
    vocabulary, vocabulary_is_open = wanted_vocabulary(config, source), source.vocabulary is None
    if vocabulary_is_open and vocabulary is not None:
        source = source.with_vocabulary(vocabulary)
    model = source.meta()
    shapes = {info.name: info.shape for info in describe(model) if info.trainable}
    sizes = model_sizes(model, source.vocabulary or 0)
    precision = resolve_precision(config.precision, cpu_has_bf16_units())
    syncs: Any = config.syncs
    sync_bytes = sum(sync.state_bytes(shapes) for sync in syncs) // grid.ranks
    logit_rows = _logit_rows(config, -(-sizes.vocabulary // grid.tensor))
    optimizer: Any = config.optimizer
    return Plan(
        config=config,
        model=sizes,
        vocabulary_is_open=vocabulary_is_open,
        batch=batch,
        precision=precision,
        grid=grid,
        memory=rank_memory(
            sizes,
            batch,
            grid=grid,
            zero=config.layout.zero,
            precision=precision,
            recompute=config.layout.recompute,
            state_per_parameter=optimizer.state_per_parameter,
            sync_bytes=sync_bytes if config.all_replicas > 1 else 0,
            logit_rows=logit_rows,
        ),
        wire_bytes=tuple(
            sync.wire_bytes(shapes, size, config.train.steps) / config.train.steps / grid.ranks
            for sync, size in zip(syncs, config.group_sizes, strict=True)
        ),
        logit_rows=logit_rows,
    )


def _logit_rows(config: Config, vocabulary: int) -> int | None:
    """Tried with a small model of the family."""
    try:
        subject = Subject.of(config, full=False)
        if holds_all_logits(subject.model(torch.float32), subject.sample()):
            return None
    except Exception:  # a family that cannot be made small raises what it likes
        return None
    return rows_at_a_time(vocabulary, on_cpu=not torch.cuda.is_available())


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
