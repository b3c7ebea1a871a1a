"""The sections of a config: all that is not chosen by name."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from paceline.config.options import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Options,
    Positive,
    Text,
    not_bool,
)


class ModelConfig(Options):
    """Which model: exactly one of ``config`` (a Hugging Face config as a map), ``preset`` or ``path``."""

    config: dict[str, Any] | None = None
    """Fields of the family's config in transformers, with its ``model_type``; weights start from random values."""
    preset: str | None = None
    """A named model of ours, such as ``llama-5m``; weights start from random values."""
    path: str | None = None
    """A folder with a Hugging Face model and its weights, or a name on the hub."""
    attention: str = "auto"
    """``auto``, ``matmul`` (ours, uses the matrix units of CPUs), ``fused`` (the same as a compiled kernel), or any
    implementation transformers knows (``sdpa``, ``eager``, ...). ``auto`` takes ours in bf16 on a CPU."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("config", "preset", "path") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of config, preset, path; got {', '.join(given) or 'none of them'}")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, for example {model_type: llama, hidden_size: 64}")
        return self


class SourceConfig(Options):
    """One source of a mixture: where it is and how often it is drawn relative to the others."""

    source: str
    weight: Positive = 1.0


class ClientsConfig(Options):
    """Who owns which documents in a federated run."""

    by: Literal["natural", "dirichlet"] = "natural"
    """``natural``: documents of one ``label`` are of one client. ``dirichlet``: each label's documents are dealt to
    clients in shares drawn from a Dirichlet distribution."""
    label: Text = "file"
    """What tells documents apart: the ``file`` or the ``source`` that they come from, or what a column with this name
    holds, in JSON lines, CSV and Parquet."""
    count: Count | None = None
    """How many clients; default of ``natural``: one for each label."""
    alpha: Positive = 0.5
    """Of ``dirichlet``: how alike clients are. 0.1: most have few labels; 100: nearly all have the same shares."""
    least: Count = 1
    """Documents that every client of ``dirichlet`` has at least; shares are drawn anew until it is so."""

    @model_validator(mode="after")
    def _has_count(self) -> Self:
        if self.by == "dirichlet" and self.count is None:
            raise ValueError("by=dirichlet needs a count of clients, for example {by: dirichlet, count: 100}")
        return self


class DataConfig(Options):
    """What is learned from, and how it is cut into documents and dealt out."""

    source: str | tuple[str | SourceConfig, ...]
    """A path, directory, glob or named corpus (``python-docs``), or a list of them, each with a weight if wanted."""
    document: Literal["auto", "file", "paragraph", "line", "row"] = "auto"
    """What one document is; ``auto``: a row in JSON lines, CSV and Parquet, a file elsewhere."""
    split: Literal["sample", "sentence", "file"] = "sample"
    """What is dealt out to replicas: packed rows, sentences (shuffled, then packed), or whole files."""
    field: Text = "text"
    """The column of JSON lines, CSV and Parquet that holds the text."""
    held_out: Fraction = 0.01
    """Share of the documents, chosen by a hash of their text, that is measured on and never trained on."""
    tokenizer: Text | None = None
    """A folder or hub name; default: the model's own, or a byte-level BPE trained on the data."""
    vocabulary: Count | None = None
    """Entries of a tokenizer trained on the data; default: as many as the model has, or 8192."""
    isolate_documents: bool = False
    """Positions restart and attention does not cross at a document boundary inside a packed row."""
    clients: ClientsConfig | None = None
    """Of ``sync: federated``: who owns which documents."""
    cache: Text | None = None
    """Folder of tokenised data; default: ``$PACELINE_CACHE`` or ``~/.cache/paceline``."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.sources:
            raise ValueError("source is an empty list; expected at least one path")
        if not all(source.source for source in self.sources):
            raise ValueError("source is an empty text; expected a path, directory, glob or named corpus")
        return self

    @property
    def label(self) -> str | None:
        """The column of tables that tells clients apart, if it is one."""
        label = None if self.clients is None else self.clients.label
        return None if label in ("file", "source") else label

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources as a weighted list, whatever way they were written."""
        given = (self.source,) if isinstance(self.source, str) else self.source
        return tuple(SourceConfig(source=s) if isinstance(s, str) else s for s in given)


class LossScaleConfig(Options):
    """By what the loss is multiplied before the backward pass in fp16: a power of two that falls by half when a
    gradient overflows, and doubles after many steps without."""

    initial: Positive = 65536.0
    """In the first step; a power of two."""
    growth_steps: Count = 2000
    """Steps without overflow after which it doubles, up to 2^24."""
    least: Positive = 1.0
    """An overflow at this scale, or a loss that is not finite at it, ends the run; a power of two."""

    @model_validator(mode="after")
    def _powers_of_two(self) -> Self:
        """So that scaling rounds nothing."""
        for name in ("initial", "least"):
            if math.frexp(value := getattr(self, name))[0] != 0.5:
                raise ValueError(f"{name}={value:g} is not a power of two; use {2.0 ** round(math.log2(value)):g}")
        if self.least > self.initial:
            raise ValueError(f"least={self.least:g} is above initial={self.initial:g}")
        return self


class BatchWarmup(Options):
    """A smaller batch at the start, which grows to ``batch.sequences``; a function of the step alone."""

    start: Count
    """Sequences of the first step."""
    steps: Count
    """Steps before the batch is full."""
    by: Count = 1
    """So many sequences are added at a time, at even distances; what the ranks share evenly wastes no places."""


class BatchConfig(Options):
    """The batch of one step, over all ranks."""

    sequences: Count = 8
    """Sequences of one step, over all ranks; with ``sync: federated``, of one local step of one client."""
    sequence_tokens: Count = 512
    """Tokens of one sequence."""
    micro: Count | Literal["auto"] | None = None
    """Sequences of one forward pass per data-parallel rank; default: all of the rank's share at once. ``auto``: as
    many as fit into memory, tried before the first step."""
    warmup: BatchWarmup | None = None
    """A smaller batch at the start, such as ``{start: 8, steps: 200, by: 8}``."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.warmup is not None and self.warmup.start >= self.sequences:
            raise ValueError(
                f"warmup.start={self.warmup.start} is not below sequences={self.sequences}, to which the batch grows"
            )
        return self


class LayoutConfig(Options):
    """How one replica's computation is cut over its own ranks."""

    shard: Count = 1
    """Ranks that share the states of one replica, each with sequences of its own (ZeRO)."""
    zero: Literal[1, 2, 3] = 3
    """What ``shard`` and ``context`` ranks share: 1 the optimizer's states, 2 gradients too, 3 weights too."""
    offload: bool = False
    """Keep what ``shard`` and ``context`` ranks share in main memory, and update it there; the device holds what is
    being computed with. On a machine without a device, where all is in main memory, it changes nothing."""
    tensor: Count = 1
    """Ranks that share each matrix."""
    tensor_patterns: dict[Text, Text] | None = None
    """How ``tensor`` cuts modules of a family without a plan: ``{mlp.up_proj: column, mlp.down_proj: row}``."""
    sequence: bool = False
    """Cut what lies between the matrices of ``tensor`` ranks along the sequence (sequence parallelism)."""
    pipeline: Count = 1
    """Ranks that hold one part of the blocks each."""
    schedule: Text = "1f1b"
    """Order of a pipeline's micro-batches: gpipe, 1f1b, interleaved1f1b, looped_bfs, interleaved_zero_bubble, zbv,
    dualpipev, or a CSV file."""
    context: Count = 1
    """Ranks that share each sequence."""
    attention: Literal["ring", "ulysses"] = "ring"
    """How ``context`` ranks attend: keys and values go round, or heads are dealt out."""
    expert: Count = 1
    """How many of the ``shard`` and ``context`` ranks share the experts of a mixture; it adds no ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass: ``full`` keeps only the input of each block, ``selective`` also the
    results of matrix products with weights, of attention and of what ranks send each other."""


class TrainConfig(Options):
    """How long, and where the results go."""

    steps: Count
    """Steps of the whole run; a run that is continued goes on to this one. With ``sync: federated``, rounds."""
    output: Text = "runs/run"
    """The run's folder."""
    clip_norm: Positive | None = 1.0
    """Global gradient norm above which gradients are scaled down; null for none."""
    clip_block_norm: Positive | None = None
    """The same for each block of the model by itself, and for what is outside of the blocks; before ``clip_norm``."""
    clip_value: Positive | None = None
    """Greatest absolute value of a gradient, above which it is cut; before the norms."""
    compile: bool = False
    """Compile each block with torch.compile."""
    port: Annotated[int, Field(ge=0, lt=65536), BeforeValidator(not_bool)] = 0
    """TCP port of the rendezvous store on this machine; 0 takes a free one."""


class RegularisationConfig(Options):
    """What pulls at matrices besides the loss, whatever the optimizer; norms and biases are left alone."""

    l2: NonNegative = 0.0
    """Strength of half the squared norm of the weights in the loss. Not AdamW's decay, which goes by the rate alone."""
    l1: NonNegative = 0.0
    """Strength of the sum of absolute weights: each goes toward 0 by rate times this after every step (soft threshold),
    and many are exactly 0."""
    momentum: NonNegative = 0.0
    """Strength of half the squared length of the last update in the loss: the gradient gets this times (weight - weight
    before the last update), which damps momentum. Keeps a copy of the weights."""
    max_norm: Positive | None = None
    """Rows of matrices (the weights into one unit, the vector of one token) that are longer are scaled back to it."""


class CheckpointConfig(Options):
    """When states are saved, how many are kept, and where a run starts from."""

    every: Natural = 0
    """Steps between checkpoints; 0 saves at the end (and on Ctrl-C) only."""
    keep: Count = 3
    """How many of the newest are kept."""
    keep_every: Natural = 0
    """Steps whose checkpoints are never removed: every multiple of this; 0 for none."""
    resume: Literal["auto", "never"] | Natural = "auto"
    """``auto`` continues from the newest complete step if there is one; a number asks for that step; ``never`` refuses
    a folder that already holds a run."""


class PerturbConfig(Options):
    """Shrink and perturb (Ash & Adams 2020, arXiv 1910.08475): weights = shrink weights + noise new first values."""

    at: Literal["cycle"] | tuple[Count, ...]
    """After these steps, or at the end of each ``cycle`` of the schedule of the rate."""
    shrink: Fraction
    """What is kept of every weight."""
    noise: NonNegative
    """What is added of weights drawn anew, as at the start, from (seed, step, name)."""


class SpikesConfig(Options):
    """Go back to the newest checkpoint when the loss leaps, and leave out the batches it has leapt on."""

    threshold: Positive = 10.0
    """A loss leaps that is above the median of those before it by so many times their median distance from it, and by a
    tenth of it; or that is not a number."""
    window: Annotated[int, Field(ge=10), BeforeValidator(not_bool)] = 50
    """How many losses before it are looked at; none leaps before there are so many."""
    patience: Count = 1
    """Leaps in a row after which the run goes back; a loss that is not a number does not wait."""
    skip: Natural = 0
    """Further steps whose batches are left out after that."""
    most: Count = 3
    """How often the run may go back to one checkpoint; then it ends with an error."""


class EarlyStopConfig(Options):
    """End when the held-out loss no longer falls, with the weights that had the best one."""

    patience: Count = 3
    """Measurements of ``evaluate.every`` in a row that are no better."""
    least: NonNegative = 0.0
    """A better one is lower by more than this, in nats."""


class EvaluateConfig(Options):
    """What is measured on the held-out part."""

    every: Natural = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    sequences: Count = 64
    """At most this many held-out rows."""
    prompts: tuple[str, ...] = ()
    """Continued by the model at every evaluation; the texts stand in the report."""
    sample_tokens: Count = 64
    """Tokens written after each prompt."""


class TrackConfig(Options):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Write event files for TensorBoard into the run's folder."""
    display: Literal["auto", "live", "plain", "none"] = "auto"
    """``auto``: live on a terminal, plain lines elsewhere."""
