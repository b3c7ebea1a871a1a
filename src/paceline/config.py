"""The config tree: what a run is made of, read from YAML, with overrides from the command line.

Every value a user can set stands here or, for a strategy chosen by name (objective, optimizer, schedule, sync), beside
the class it configures. Nothing here is derived: what follows from other values is computed in ``plan``. The problems
of a config are collected and raised once, each with its path and its value.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import core_schema

from paceline import registry
from paceline.errors import ConfigError


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a truth value")
    return value


Count = Annotated[int, Field(gt=0), BeforeValidator(_not_bool)]
Natural = Annotated[int, Field(ge=0), BeforeValidator(_not_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_not_bool)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_not_bool)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False), BeforeValidator(_not_bool)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """Base of every part of a config: frozen, keyword-only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


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
    port: Annotated[int, Field(ge=0, lt=65536), BeforeValidator(_not_bool)] = 0
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
    window: Annotated[int, Field(ge=10), BeforeValidator(_not_bool)] = 50
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
    def syncs(self) -> tuple[Options, ...]:
        """How replicas agree at each level, innermost first."""
        return self.sync if isinstance(self.sync, tuple) else (self.sync,)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many replicas, or groups of the level below, agree at each level."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas,)

    @property
    def keeps_equal(self) -> bool:
        """Whether all replicas hold the same training state after every step."""
        return all(sync.keeps_equal for sync in self.syncs)  # type: ignore[attr-defined]

    @property
    def is_exact(self) -> bool:
        """Whether all replicas learn what one process with the whole batch would."""
        return all(getattr(sync, "is_exact", sync.keeps_equal) for sync in self.syncs)  # type: ignore[attr-defined]

    @property
    def keeps_own(self) -> bool:
        """Whether each replica has something of its own to save."""
        differs = not self.keeps_equal and not self.is_elastic  # else all hold the same where weights are saved
        return differs or any(getattr(sync, "keeps_own", False) for sync in self.syncs)

    @property
    def is_elastic(self) -> bool:
        """Whether a run goes on without a replica that is gone, unless it is the first."""
        return any(getattr(sync, "is_elastic", False) for sync in self.syncs)

    @property
    def in_rounds(self) -> bool:
        """Whether a step is a round: clients take steps of their own, one after the other, at each replica."""
        return any(getattr(sync, "in_rounds", False) for sync in self.syncs)

    @property
    def learning_alone(self) -> str:
        """The sync that lets replicas differ, as the config spells it; there is one."""
        return next(f"sync={strategy_name(sync)}" for sync in self.syncs if not sync.keeps_equal)  # type: ignore[attr-defined]

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
            problems += _sentences(error, cls, ())
        if problems:
            raise ConfigError(problems)
        return config

    def tree(self) -> dict[str, Any]:
        """The resolved config as plain values; ``parse(tree())`` gives an equal config."""
        values = self.model_dump(mode="json")
        for key in STRATEGIES.keys() - {"sync"}:
            values[key] = _named(getattr(self, key))
        values["sync"] = [_named(sync) for sync in self.sync] if isinstance(self.sync, tuple) else _named(self.sync)
        return values


STRATEGIES: dict[str, tuple[registry.Table, Any]] = {
    "objective": (registry.OBJECTIVES, "next_token"),
    "optimizer": (registry.OPTIMIZERS, "adamw"),
    "schedule": (registry.SCHEDULES, "cosine"),
    "sync": (registry.SYNC_CHOICES, "all_reduce"),
    "average": (registry.AVERAGES, "none"),
}


def choose(table: registry.Table, value: Any) -> Options:
    """Turn ``name`` or ``{name: ..., options}`` into the strategy's config.

    Raises ``ConfigError`` with every problem, each under the path ``table.kind``.
    """
    if isinstance(value, Options):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{table.kind}={value!r}: expected a name or {{name: ..., options}}; known: {', '.join(table)}"
        )
    config_class: type[Options] = table.load(value["name"])
    try:
        return config_class.model_validate({key: item for key, item in value.items() if key != "name"})
    except ValidationError as error:
        raise ConfigError(_sentences(error, config_class, (table.kind,))) from None


def _named(options: Options) -> dict[str, Any]:
    """The form that ``choose`` reads."""
    return {"name": strategy_name(options), **options.model_dump(mode="json")}


def strategy_name(options: Options) -> str:
    """The name under which a strategy's config class stands in its table."""
    inner = (registry.REDUCERS, registry.SERVERS, registry.AGGREGATES)
    for table in (*(table for table, _ in STRATEGIES.values()), *inner):
        for name in table:
            if table.target(name) == f"{type(options).__module__}:{type(options).__name__}":
                return name
    raise ConfigError(f"{type(options).__name__} stands in no strategy table")


@dataclass(frozen=True)
class ChosenFrom:
    """Marks a field of a strategy, ``Annotated[Any, ChosenFrom(table)]``: it takes what ``choose`` takes."""

    table: registry.Table

    def __get_pydantic_core_schema__(self, _: Any, __: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            partial(choose, self.table), serialization=core_schema.plain_serializer_function_ser_schema(_named)
        )

    def __get_pydantic_json_schema__(self, _: Any, __: Any) -> dict[str, Any]:
        names = {"enum": list(self.table)}
        return {"anyOf": [names, {"type": "object", "properties": {"name": names}, "required": ["name"]}]}


class _Loader(yaml.SafeLoader):
    """YAML without the silent loss of a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key: Any = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply ``key.path=value`` overrides; ``ConfigError`` if anything is wrong."""
    return Config.parse(override(read_tree(path), overrides))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file whose top level is a map."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(path)!r}: {error.strerror}; `paceline init {path}` writes one") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {str(path)!r} is not text; expected a YAML file") from None
    tree = _yaml(text, f"config {str(path)!r}")
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(path)!r} holds {type(tree).__name__}; expected `key: value` lines")
    return tree


def override(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``a.b.c=value`` in a copy of ``tree``; values are read as YAML."""
    result: dict[str, Any] = _copy(tree)
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {item!r}: expected key.path=value, for example train.steps=100")
        node = result
        for key in keys[:-1]:
            child = node.get(key)
            if node is result and key in STRATEGIES:
                child = STRATEGIES[key][1] if child is None else child
                child = {"name": child} if isinstance(child, str) else child
            node[key] = child = dict(child) if isinstance(child, dict) else {}
            node = child
        node[keys[-1]] = _yaml(text, f"override {item!r}")
    return result


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, with the options of every strategy."""
    whole = Config.model_json_schema()
    for key, (table, default) in STRATEGIES.items():
        forms: list[dict[str, Any]] = [{"enum": list(table)}]
        for name in table:
            form = table.load(name).model_json_schema(ref_template=f"#/$defs/{key}.{name}.{{model}}")
            for inner, definition in form.pop("$defs", {}).items():
                whole["$defs"][f"{key}.{name}.{inner}"] = definition
            form["properties"] = {"name": {"const": name}, **form.get("properties", {})}
            form["required"] = ["name", *form.get("required", [])]
            forms.append(form)
        if key == "sync":
            forms.append({"type": "array", "items": {"anyOf": list(forms)}, "minItems": 1})
        whole["properties"][key] = {"anyOf": forms, "default": default}
    whole["required"] = [key for key in whole["required"] if key not in STRATEGIES]
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return whole


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{what} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _sentences(error: ValidationError, model: type[Options], prefix: tuple[str, ...]) -> list[str]:
    """One sentence for each problem pydantic found: path, value, what was expected."""
    sentences: dict[str, str] = {}  # by path: a union reports one problem for each of its members
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if not _is_union_tag(part)]
        path = ".".join(str(part) for part in (*prefix, *location))
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            sentence = f"{path}: unknown key, {registry.unknown(str(location[-1]), known).partition(', ')[2]}"
        elif problem["type"] == "missing":
            sentence = f"{path} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:].replace("Input should be", "expected")
            message = message.replace("input should be", "expected").replace("string should have", "expected")
            value = problem["input"]
            shown = f"={value!r}" if not isinstance(value, dict | BaseModel) else ""
            sentence = f"{path}{shown}: {message}"
        sentences[path] = f"{sentences[path]}, or {sentence.rpartition(': ')[2]}" if path in sentences else sentence
    return list(sentences.values())


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the member of a union that it tried into the path (``tuple[...]``, ``SourceConfig``)."""
    return isinstance(part, str) and (part in {"str", "int", "SourceConfig"} or "[" in part)


def _fields_at(model: type[Options], location: list[Any]) -> list[str]:
    fields = model.model_fields
    for part in location:
        inner = _model_in(fields[part].annotation) if part in fields else None
        fields = inner.model_fields if inner else fields
    return list(fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is, or that stands in its list or among its members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for member in get_args(annotation) if (inner := _model_in(member))), None)
