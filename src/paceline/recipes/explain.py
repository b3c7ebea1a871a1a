"""``paceline train --dry-run``: the whole plan in words and numbers, without starting a process."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from paceline.comm.device import cores, processor_name, units
from paceline.config import Config, strategy_name
from paceline.errors import ConfigError
from paceline.models.describe import describe
from paceline.objectives.base import holds_all_logits
from paceline.objectives.head_cross_entropy import rows_at_a_time
from paceline.optim.base import check_groups
from paceline.plan.batch import Batches, BatchPlan
from paceline.plan.layout import Grid, data_rank
from paceline.plan.memory import RankMemory, rank_memory
from paceline.plan.model import ModelSizes
from paceline.plan.precision import Precision, resolve_precision
from paceline.plan.run import plan_batches, plan_run
from paceline.recipes.rates import average_words, growth_words, perturb_words, policy_words, rate_words, rates
from paceline.train.assemble import (
    check_positions,
    model_sizes,
    resolve_model,
    wanted_vocabulary,
)
from paceline.train.clients import check_extras
from paceline.train.settle import settle
from paceline.verify.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config comes to."""

    config: Config
    model: ModelSizes
    vocabulary_is_open: bool
    batches: Batches
    memory: RankMemory
    precision: Precision
    grid: Grid
    wire_bytes: tuple[float, ...]
    """Payload that each rank sends in a step on average, at each level of the sync."""
    chosen: tuple[str, ...]
    """Of each sync that was ``auto``: what it has become, and why."""
    logit_rows: int | None
    """How many rows of logits are there at once; None for all, or for a family with which this could not be tried."""

    @property
    def batch(self) -> BatchPlan:
        """Of a step with the full batch."""
        return self.batches.full

    @property
    def tokens(self) -> int | None:
        """Of the whole run, over all ranks; None where clients make passes over data that have not been read."""
        sync: Any = self.config.syncs[-1]
        in_rounds = self.config.in_rounds
        if in_rounds and sync.local_steps is None:
            return None
        times = self._clients * sync.local_steps if in_rounds else 1
        return times * self.batches.sequences(1, self.config.train.steps) * self.batch.sequence_tokens

    @property
    def _clients(self) -> int:
        """Of a round, if nobody is late."""
        sync: Any = self.config.syncs[-1]
        updates: int = sync.updates
        return updates

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        memory = {**asdict(self.memory), "states": self.memory.states, "total_estimate": self.memory.total_estimate}
        return {
            "config": self.config.tree(),
            "model": asdict(self.model),
            "batch": {**self._dealt(), "tokens": self.batch.tokens, "filling": self.batch.filling},
            "rates": rates(self.config, self.batches),
            "precision": self.precision.name,
            "ranks": [
                {"rank": rank, "replica": rank // self.grid.ranks, "does": self._duty(rank)}
                for rank in range(self.config.all_replicas * self.grid.ranks)
            ],
            "bytes_per_rank": memory,
            "wire_bytes_per_step": sum(self.wire_bytes),
            "chosen": list(self.chosen),
            "logit_rows": self.logit_rows,
            "tokens_in_all": self.tokens,
        }

    def text(self) -> str:
        """For a person."""
        c, b, m = self.config, self.batch, self.memory
        open_note = " (the vocabulary follows the tokenizer)" if self.vocabulary_is_open else ""
        filling = f", {b.filling} place(s) filled with zero weight" if b.filling else ""
        lines = [
            f"model      {self.model.parameters:,} parameters in {self.model.tensors} tensors, "
            f"{self.model.layers} blocks{open_note}",
            f"batch      {b.sequences} sequences x {b.sequence_tokens} tokens = {b.tokens:,} tokens a "
            f"{'local step' if c.in_rounds else 'step'}"
            f" = {b.data_parallel} rank(s) x {self._micro_words()}{filling}",
            *self._line("", growth_words(c, self.batches)),
            f"run        {self._run_words()}, into {c.train.output}",
            f"precision  {self._precision_words()}",
            f"logits     {self._logits()}",
            f"optimizer  {strategy_name(c.optimizer)}, {strategy_name(c.schedule)} schedule",
            f"rate       {rate_words(c, self.batches)}",
            *self._line("average", average_words(c)),
            *self._line("perturb", perturb_words(c)),
            *self._line("policies", policy_words(c)),
            *self._syncs(),
            *(f"           {words}" for words in self.chosen),
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

    @property
    def _is_auto(self) -> bool:
        return self.config.batch.micro == "auto"

    def _dealt(self) -> dict[str, Any]:
        """The batch, as far as it is known before the run."""
        return {**asdict(self.batch), **({"micro": "auto", "micro_batches": "auto"} if self._is_auto else {})}

    def _run_words(self) -> str:
        """How long it is; of clients that make whole passes, the tokens are known when the data have been read."""
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        if not self.config.in_rounds:
            return f"{self.config.train.steps:,} steps{tokens}"
        sync: Any = self.config.syncs[-1]
        each = (
            f"{sync.local_steps} local steps" if sync.local_steps else f"{sync.epochs or 1} pass(es) over its own data"
        )
        return f"{self.config.train.steps:,} rounds of {self._clients} clients, {each} each{tokens}"

    def _micro_words(self) -> str:
        if self._is_auto:
            return f"{self.batch.micro} sequence(s), micro auto: as many at once as fit, tried before the first step"
        return f"{self.batch.micro_batches} micro-batch(es) x {self.batch.micro} sequence(s)"

    def _precision_words(self) -> str:
        how = "asked" if self.config.precision != "auto" else "auto"
        here = ", ".join(sorted(units(torch.device("cpu")))) or "no 16-bit"
        return (
            f"{self.precision.name} ({how}; this processor has {here} units), {self.config.reduction} sums of gradients"
        )

    def _line(self, name: str, words: str | None) -> list[str]:
        return [] if words is None else [f"{name:<11}{words}"]

    def _syncs(self) -> list[str]:
        """A line for each level, innermost first."""
        syncs: Any = self.config.syncs
        levels = zip(syncs, self.config.group_sizes, self.wire_bytes, strict=True)
        things = ["replica(s)", *["group(s)"] * (len(self.wire_bytes) - 1)]
        return [
            f"sync       {_named(sync)} over {size} {thing}, {_bytes(sent)} sent by each rank a step"
            + (", on average" if not sync.sends_evenly else "")
            + (" and at most" if sync.sends_less else "")
            for (sync, size, sent), thing in zip(levels, things, strict=True)
        ]

    def _logits(self) -> str:
        if self.logit_rows is None:
            return "all of a micro-batch at once (the model changes what its head gives, or could not be tried)"
        return f"at most {self.logit_rows} positions at a time"

    def _memory_rows(self) -> list[tuple[str, int]]:
        m, one = self.memory, ", one sequence" if self._is_auto else ""
        return [
            (f"{self.precision.stored} weights, which learn", m.master_weights),
            ("weights to compute with", m.compute_weights),
            ("gradients", m.gradients),
            ("optimizer state", m.optimizer),
            *([("copies of the weights", m.copies)] if m.copies else []),
            ("sync buffers", m.sync),
            (f"activations (estimate{one})", m.activations_estimate),
            (f"logits (estimate{one})", m.logits_estimate),
        ]

    def _duty(self, rank: int) -> str:
        batch, (replica, inside) = self.batch, divmod(rank, self.grid.ranks)
        place = self.grid.place(inside)
        in_rounds = self.config.in_rounds
        first = place.shard if in_rounds else data_rank(replica, self.config.group_sizes, place.shard)
        share = len(range(first, batch.sequences, batch.data_parallel))
        cuts = [f"{axis} {at + 1} of {size}" for axis, at, size in self.grid.cuts(inside)]
        part = ", ".join(cuts) or "the whole model"
        own = "" if not self.config.keeps_own else "; writes its replica's part of a checkpoint"
        writes = "; writes metrics, checkpoints and the export" if rank == 0 else own
        of = "sequences of each client" if in_rounds else "sequences"
        return f"replica {replica}, {part}, {share} of {batch.sequences} {of}{writes}"


def _named(sync: Any) -> str:
    """A strategy, with its reducer if that leaves something out."""
    reducer: Any = getattr(sync, "reducer", None)
    name = strategy_name(sync)
    return name if reducer is None or reducer.is_exact else f"{name} by {strategy_name(reducer)}"


def explain(config: Config) -> Plan:
    """Resolve a config into its plan; raises what a run would raise before it starts."""
    source = resolve_model(config)
    if source is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    chosen: list[str] = []
    config = settle(config, say=chosen.append)
    grid, batch = plan_run(config)
    check_extras(config)
    schedule: Any = config.schedule
    average: Any = config.average
    check_positions(source, config.batch.sequence_tokens)
    vocabulary, vocabulary_is_open = wanted_vocabulary(config, source), source.vocabulary is None
    if vocabulary_is_open and vocabulary is not None:
        source = source.with_vocabulary(vocabulary)
    model = source.meta()
    shapes = {info.name: info.shape for info in describe(model) if info.trainable}
    sizes = model_sizes(model, source.vocabulary or 0)
    precision = resolve_precision(config, units(torch.device("cpu")))
    syncs: Any = config.syncs
    value_bytes = {"fp32": 4, "bf16": 2}[config.reduction]
    sync_bytes = sum(sync.state_bytes(shapes, value_bytes) for sync in syncs) // grid.ranks
    logit_rows = _logit_rows(config, -(-sizes.vocabulary // grid.tensor))
    optimizer: Any = config.optimizer
    check_groups(optimizer, list(shapes))
    tried = plan_batches(config, 1).full if config.batch.micro == "auto" else batch
    return Plan(
        config=config,
        chosen=tuple(chosen),
        model=sizes,
        vocabulary_is_open=vocabulary_is_open,
        batches=plan_batches(config),
        precision=precision,
        grid=grid,
        memory=rank_memory(
            sizes,
            tried,
            grid=grid,
            zero=config.layout.zero,
            precision=precision,
            recompute=config.layout.recompute,
            optimizer_bytes=optimizer.state_bytes(shapes),
            sync_bytes=sync_bytes if config.all_replicas > 1 or config.in_rounds else 0,
            logit_rows=logit_rows,
            copy_bytes=4 * average.keeps
            + precision.stored_bytes * ((schedule.measures == "change") + (config.regularisation.momentum > 0)),
        ),
        wire_bytes=tuple(
            sync.wire_bytes(shapes, size, config.train.steps, value_bytes) / config.train.steps / grid.ranks
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
