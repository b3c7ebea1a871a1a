"""From a config to the parts of a training loop on one rank, in the order in which the data flows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from paceline.checkpoint import Checkpointer, LocalExchange, StoreExchange
from paceline.comm.device import cores, matmul_flops_per_s
from paceline.comm.ranks import Coordinates, Group
from paceline.comm.world import World
from paceline.config import ClientsConfig, Config, strategy_name
from paceline.data.client_loader import ClientLoader
from paceline.data.clients import Clients, owners
from paceline.data.loader import Loader, held_out_rows
from paceline.data.order import FileOrder, Order, SampleOrder
from paceline.data.pack import PackedRows, PairedRows
from paceline.data.prepare import Prepared, prepare
from paceline.data.rows import Ints, Rows
from paceline.data.tokens import TokenSet
from paceline.errors import PlanError
from paceline.evaluate.held_out import HeldOut, Sample, tokens_per_byte
from paceline.evaluate.sample import continue_text
from paceline.models.attention import choose
from paceline.models.describe import describe
from paceline.models.source import ModelSource
from paceline.objectives.base import Objective, ObjectiveContext, ObjectiveOptions
from paceline.objectives.isolation import check_isolation
from paceline.objectives.mixup_check import check_mixup
from paceline.optim.base import OptimizerConfig
from paceline.parallel.batch_statistics import check_batch_statistics
from paceline.parallel.blocks import blocks
from paceline.parallel.expert import find_experts
from paceline.plan.batch import Batches, BatchPlan
from paceline.plan.model import ModelSizes
from paceline.plan.precision import Precision, resolve_precision
from paceline.plan.run import plan_batches, plan_run
from paceline.sync.base import Sync
from paceline.sync.hierarchy import build_sync
from paceline.train.adjustments import adjustments
from paceline.train.average import Average, check_statistics
from paceline.train.build import Built, Goal, build
from paceline.train.clients import check_extras, client_loader, identity, owned_rows
from paceline.train.micro import Trial, choose_micro
from paceline.train.perturb import Perturb
from paceline.train.policy import after
from paceline.train.rate import Rate
from paceline.train.remote import RemoteClients
from paceline.train.state import Variant

Say = Callable[[str], None]

REDUCTIONS = {"fp32": None, "bf16": torch.bfloat16}
"""What ``reduction`` means; None: as gradients come, in fp32 or more."""

DEFAULT_VOCABULARY = 8192
"""Of a tokenizer trained on the data where neither the model nor the config says a number."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the loop of one rank works with."""

    config: Config
    world: World
    source: ModelSource | None
    prepared: Prepared
    built: Built
    sizes: ModelSizes
    shapes: dict[str, tuple[int, ...]]
    """Of the trainable parameters of the whole model, by name."""
    precision: Precision
    objective: Objective
    batches: Batches
    loader: Loader | ClientLoader | RemoteClients
    optimizer_config: OptimizerConfig
    rate: Rate
    average: Average
    perturb: Perturb
    sync: Sync
    variant: Variant
    evaluator: HeldOut
    checkpointer: Checkpointer | None
    """Of the rank that writes; None on the others."""
    dropped_tokens: int
    """Of the training part: in no row."""
    file_streams: int | None
    """How many streams the files are dealt to, where files are dealt; part of the data order."""
    clients: str | None
    """Who owns what and how rounds are made, in a federated run; part of the data order."""
    peak_flops_per_s: float
    """Measured matrix-multiplication peak of all ranks together."""

    @property
    def flops_per_token(self) -> float:
        """Operations for one token, forward and backward."""
        return self.sizes.flops_per_token(self.batches.full.sequence_tokens)


def resolve_model(config: Config) -> ModelSource | None:
    """The model that the config names; None if it names none (a module is then given)."""
    return ModelSource.of(config.model, objective_options(config).head) if config.model else None


def objective_options(config: Config) -> ObjectiveOptions:
    """The objective's config, typed."""
    assert isinstance(config.objective, ObjectiveOptions)
    return config.objective


def prepare_data(config: Config, source: ModelSource | None, *, say: Say) -> Prepared:
    """Read, tokenise and cache the data, or open the cache."""
    options = objective_options(config)
    return prepare(
        config.data,
        columns=options.columns(config.data),
        vocabulary=wanted_vocabulary(config, source),
        tokenizer=source.tokenizer if source else None,
        extra_tokens=options.special_tokens(config.batch.sequence_tokens),
        workers=cores(),
        say=say,
    )


def wanted_vocabulary(config: Config, source: ModelSource | None) -> int | None:
    """Entries of a tokenizer that is trained, or the most that a given one may have; None for any number.

    ``PlanError`` if more are asked for than the model has rows.
    """
    asked, rows = config.data.vocabulary, source.vocabulary if source else None
    if asked is not None and rows is not None and asked > rows:
        raise PlanError(
            f"data.vocabulary={asked} is more than the model's {rows} rows of embedding; use {rows} or fewer"
        )
    given = config.data.tokenizer or (source and source.tokenizer)
    return rows if given else asked or rows or DEFAULT_VOCABULARY


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One end of a federated run whose clients are processes of their own: the server, or one client."""

    loader: Callable[[BatchPlan], ClientLoader | RemoteClients]
    identity: str | None = None
    """In place of who owns what: what must stay the same when a run goes on."""
    secret: str | None = None
    """What the server's noise follows from."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is learned, from what, and what it is measured on: the same under every layout."""

    model: nn.Module
    """Whole, on the CPU, with its values."""
    source: ModelSource | None
    prepared: Prepared
    options: ObjectiveOptions
    context: ObjectiveContext
    objective: Objective
    train: Sequence[Rows]
    order: Order
    held_out: Sequence[Rows]
    dropped_tokens: int = 0
    clients: Clients | None = None
    """Of a federated run: whose the rows are."""
    remote: Remote | None = None
    """Of a federated run whose clients are processes of their own."""


def assemble(
    config: Config,
    world: World,
    *,
    module: nn.Module | None = None,
    objective: Objective | None = None,
    saves: bool = True,
    say: Say = print,
) -> Parts:
    """Build every part of this rank. ``module`` and ``objective`` take the place of those the config names.

    ``saves=False``: nothing is written to the run's folder.
    """
    check_extras(config)
    precision = resolve_precision(config, world.device.units)
    material = make_material(config, module=module, objective=objective, say=say)
    peak = matmul_flops_per_s(world.device, getattr(torch, precision.compute))
    peak_flops_per_s = world.coordinates.global_ranks * peak
    return put_together(config, world, material, precision=precision, peak_flops_per_s=peak_flops_per_s, saves=saves)


def put_together(
    config: Config,
    world: World,
    material: Material,
    *,
    precision: Precision,
    peak_flops_per_s: float,
    saves: bool = True,
) -> Parts:
    """Cut the model as the config's layout says, deal out the rows, and build what the loop needs besides."""
    device = world.device
    variant, writes = which_variant(config, world.coordinates)
    _, batch = plan_run(config)
    assert batch.data_parallel == (world.mesh.shard.size if config.in_rounds else world.data_ranks)
    model, source, options, context = material.model, material.source, material.options, material.context
    sizes = model_sizes(model, context.special.vocabulary)
    shapes = {info.name: info.shape for info in describe(model) if info.trainable}
    lookups = looked_up(model)
    if source and source.attention == "auto":
        choose(
            model,
            dtype=getattr(torch, precision.compute),
            device=device.torch_device,
            compiled=config.train.compile,
        )
    if context.isolate_documents:
        check_isolation(model, options, context)
    average: Any = config.average
    if average.keeps:
        check_statistics(model)
    perturb = Perturb(config.perturb, model, seed=config.seed, steps=config.train.steps)
    first = [material.train[0].row(i % len(material.train[0]), i) for i in range(2)]
    sample = material.objective.batch(first, seed=config.seed, step=0)
    check_batch_statistics(model, sample, config, batch)
    if options.mixes_rows:
        check_mixup(model, sample)
    built = build(
        model,
        Goal(objective=material.objective, options=options, context=context, sample=sample),
        layout=config.layout,
        mesh=world.mesh,
        optimizer=config.optimizer,  # type: ignore[arg-type]
        adjust=partial(adjustments, config),
        precision=precision,
        reduction=REDUCTIONS[config.reduction],
        loss_scale=config.loss_scale,
        device=device.torch_device,
        seed=config.seed,
        compiled=config.train.compile,
    )
    micro = None
    if config.batch.micro == "auto":
        trial = Trial(
            built=built,
            world=world,
            objective=material.objective,
            rows=material.train[0],
            row_tokens=options.row_tokens(context),
            seed=config.seed,
            to_come_bytes=_to_come_bytes(config, world, built, shapes),
        )
        micro = choose_micro(trial, batch.micro)
    batches = plan_batches(config, micro)
    return Parts(
        config=config,
        world=world,
        source=source,
        prepared=material.prepared,
        built=built,
        sizes=sizes,
        shapes=shapes,
        precision=precision,
        objective=material.objective,
        batches=batches,
        loader=_loader(config, world, material, batches),
        optimizer_config=config.optimizer,  # type: ignore[arg-type]
        rate=Rate(config, batches, replica=built.replica, names=built.learned),
        average=Average(average, built.replica),
        perturb=perturb,
        sync=build_sync(
            config.syncs,  # type: ignore[arg-type]
            world.links,
            full=built.replica.full,
            shapes=shapes,
            lookups=lookups,
            **_of_run(config, world, material),
        ),
        variant=variant,
        evaluator=_evaluator(config, world, material, built, batches.full),
        checkpointer=_checkpointer(config, world, variant) if writes and saves else None,
        dropped_tokens=material.dropped_tokens,
        file_streams=material.order.streams if isinstance(material.order, FileOrder) else None,
        clients=identity(config, material.clients) if material.remote is None else material.remote.identity,
        peak_flops_per_s=peak_flops_per_s,
    )


def _loader(
    config: Config, world: World, material: Material, batches: Batches
) -> Loader | ClientLoader | RemoteClients:
    if material.remote is not None:
        return material.remote.loader(batches.full)
    if material.clients is not None:
        return client_loader(config, world, material.train, material.clients, batches.full)
    return Loader(
        material.train,
        material.order,
        batches,
        rank=world.data_rank,
        partner_seed=config.seed if material.options.mixes_rows else None,
    )


def _of_run(config: Config, world: World, material: Material) -> dict[str, Any]:
    return {
        "steps": config.train.steps,
        "seed": config.seed,
        "rank": world.coordinates.rank,
        "clients": 0 if material.clients is None else len(material.clients),
        "are_processes": material.remote is not None,
        "secret": None if material.remote is None else material.remote.secret,
        "servers": world.servers,
        "meets": partial(_is_looked_at, config),
        "clip_norm": config.train.clip_norm,
    }


def _is_looked_at(config: Config, step: int) -> bool:
    todo = after(config, step, stop=False)
    return todo.evaluate or todo.save


def _to_come_bytes(config: Config, world: World, built: Built, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What a rank holds from the first step on besides weights, gradients and activations; a save copies it to main
    memory, with the weights."""
    optimizer: Any = config.optimizer
    average: Any = config.average
    sync: Any = config.syncs[-1]
    own = {shard.name: tuple(shard.local.shape) for shard in built.replica.shards}
    numel = sum(shard.local.numel() for shard in built.replica.shards)
    kept: int = optimizer.state_bytes(shapes) // world.mesh.world.size + 4 * numel * average.keeps
    buckets: int = sync.state_bytes(own) if world.link.size > 1 or config.in_rounds else 0
    copied = kept + 4 * numel if world.device.torch_device.type == "cpu" and world.coordinates.replica == 0 else 0
    return kept + buckets + copied


def make_material(
    config: Config,
    *,
    module: nn.Module | None = None,
    objective: Objective | None = None,
    owners_of: Callable[[Sequence[TokenSet], ClientsConfig, int], tuple[list[Ints] | None, int]] = owners,
    say: Say,
) -> Material:
    """What the config names, or was passed. ``owners_of``: whose the documents of a federated run are."""
    source = resolve_model(config) if module is None else None
    prepared = prepare_data(config, source, say=say)
    if source:
        source = source.with_vocabulary(prepared.special.vocabulary, asdict(prepared.special))
        check_positions(source, config.batch.sequence_tokens)
    context = objective_context(config, prepared, source)
    options = objective_options(config)
    whose: Sequence[Ints] | None = None
    count = 0
    if config.data.clients is not None:
        whose, count = owners_of(prepared.train, config.data.clients, config.seed)
    train = _rows(config, prepared, options.row_tokens(context), options.overlap, whose)
    model = source.build(config.seed, dtype=_dtype_to_cut(config)) if source else module
    if model is None:
        raise PlanError("there is no model: set model.config, model.preset or model.path, or pass a module")
    return Material(
        model=model,
        source=source,
        prepared=prepared,
        options=options,
        context=context,
        objective=objective or options.build(context),
        train=train,
        order=_order(config, train),
        held_out=_held_out(prepared, options.row_tokens(context), options.overlap),
        dropped_tokens=sum(part.dropped_tokens for part in train),
        clients=None if whose is None else owned_rows(train, whose, count, config.seed),
    )


def _dtype_to_cut(config: Config) -> torch.dtype | None:
    """That of the model before it is cut: as stored, so that each rank reads its own part only. fp32 where the whole
    model is first tried, which 16 bits are too coarse for."""
    is_tried = config.layout.context > 1 or config.layout.pipeline > 1 or config.data.isolate_documents
    return torch.float32 if is_tried else None


def model_sizes(model: nn.Module, vocabulary: int) -> ModelSizes:
    """Counts of a module, which may be on the meta device."""
    infos = describe(model)
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    hugging_face: Any = model
    embedding = hugging_face.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    table = getattr(embedding, "weight", None)
    head = hugging_face.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    lookup_only = table is not None and getattr(head, "weight", None) is not table
    return ModelSizes(
        parameters=sum(info.numel for info in infos),
        trainable=sum(info.numel for info in infos if info.trainable),
        lookup_parameters=table.numel() if lookup_only and table is not None else 0,
        experts=sum(p.numel() for module in find_experts(model).values() for p in module.parameters()),
        tensors=len(infos),
        layers=len(blocks(model)),
        width=getattr(text, "hidden_size", 0) or 0,
        vocabulary=getattr(text, "vocab_size", None) or vocabulary,
    )


def looked_up(model: nn.Module) -> frozenset[str]:
    """The input embedding's table, if only embeddings have it: a batch uses only the rows of its tokens."""
    hugging_face: Any = model
    embedding = hugging_face.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        return frozenset()
    table = embedding.weight
    users = [module for module in model.modules() if any(p is table for p in module._parameters.values())]
    names = (name for name, parameter in model.named_parameters() if parameter is table)
    return frozenset(names) if all(isinstance(user, nn.Embedding) for user in users) else frozenset()


def objective_context(config: Config, prepared: Prepared, source: ModelSource | None) -> ObjectiveContext:
    """What the objective is told about tokenizer, model and batch."""
    decoder_start = None
    if source and source.head == "seq2seq":
        decoder_start = source.hugging_face_config().decoder_start_token_id
    return ObjectiveContext(
        special=prepared.special,
        sequence_tokens=config.batch.sequence_tokens,
        isolate_documents=config.data.isolate_documents,
        decoder_start=decoder_start,
    )


def _rows(
    config: Config, prepared: Prepared, row_tokens: int, overlap: int, whose: Sequence[Ints] | None = None
) -> list[PackedRows] | list[PairedRows]:
    if prepared.train[0].target is not None:
        return [PairedRows(part, row_tokens) for part in prepared.train]
    return [
        PackedRows(
            part,
            row_tokens,
            overlap,
            shuffle_key=(config.seed, "sentences", i) if config.data.split == "sentence" else None,
            by_file=config.data.split == "file",
            clients=None if whose is None else whose[i],
        )
        for i, part in enumerate(prepared.train)
    ]


def _order(config: Config, rows: Sequence[PackedRows | PairedRows]) -> Order:
    if config.data.split != "file":
        return SampleOrder([len(r) for r in rows], [s.weight for s in config.data.sources], config.seed)
    if len(rows) != 1 or not isinstance(rows[0], PackedRows):
        raise PlanError(
            "data.split=file deals out the files of one source of plain text; use one data.source, or split=sample"
        )
    return FileOrder(rows[0].rows_per_part, config.batch.sequences, config.seed)


def _held_out(prepared: Prepared, row_tokens: int, overlap: int) -> list[Rows]:
    return [
        PackedRows(part, row_tokens, overlap, keep_tail=True)
        if part.target is None
        else PairedRows(part, row_tokens, allow_empty=True)
        for part in prepared.held_out
    ]


def _evaluator(config: Config, world: World, material: Material, built: Built, batch: BatchPlan) -> HeldOut:
    shard = world.mesh.shard
    measuring = (shard.index, shard.size) if config.is_elastic else (world.data_rank, world.data_ranks)
    return HeldOut(
        model=built.model,
        batch_of=lambda rows: built.split(material.objective.batch(rows, seed=config.seed, step=0)),
        schedule=built.schedule,
        rows=partial(held_out_rows, material.held_out, config.evaluate.sequences, *measuring),
        micro=batch.micro,
        tokens_per_byte=tokens_per_byte(material.prepared.held_out) if material.options.head == "causal" else None,
        sampler=partial(_samples, config, world, material.prepared, built),
    )


def _samples(config: Config, world: World, prepared: Prepared, built: Built) -> tuple[Sample, ...]:
    """All ranks of the first replica compute the same; the leader's are shown."""
    options = objective_options(config)
    if world.coordinates.replica != 0 or options.head != "causal" or not config.evaluate.prompts:
        return ()
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))
    backward = strategy_name(options) == "right_to_left"
    return tuple(
        {
            "prompt": prompt,
            "backward": backward,
            "text": continue_text(
                built.schedule.logits,
                tokenizer,
                prompt,
                tokens=config.evaluate.sample_tokens,
                window=config.batch.sequence_tokens,
                end=prepared.special.end,
                device=world.device.torch_device,
                backward=backward,
            ),
        }
        for prompt in config.evaluate.prompts
    )


def which_variant(config: Config, coordinates: Coordinates) -> tuple[Variant, bool]:
    """Which of how many different training states a replica holds, and whether it saves it for those with the same."""
    levels: list[tuple[Any, Group]] = list(zip(config.syncs, coordinates.groups(config.group_sizes), strict=True))
    index, count, twin, twins = 0, 1, 0, 1
    writes = True
    for sync, group in levels:
        if not sync.keeps_equal and not config.is_elastic:  # else they are saved where all hold the same
            index, count = index + group.index * count, count * group.size
        elif sync.keeps_own:
            twin, twins = twin + group.index * twins, twins * group.size
        else:
            writes = writes and group.index == 0
    return Variant(index, count, twin, twins), writes


def _checkpointer(config: Config, world: World, variant: Variant) -> Checkpointer:
    coordinates, (index, count) = world.coordinates, variant.own
    folder = Path(config.train.output) / "checkpoints"
    alone = coordinates.ranks * count == 1 or world.store is None
    return Checkpointer(
        folder,
        rank=index * coordinates.ranks + coordinates.rank,
        ranks=count * coordinates.ranks,
        exchange=LocalExchange() if alone else StoreExchange(world.store, str(folder)),  # type: ignore[arg-type]
        layout={"replicas": coordinates.replicas},
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )


def check_positions(source: ModelSource, sequence_tokens: int) -> None:
    """Raise ``PlanError`` if rows are longer than the model can tell positions apart."""
    limit = source.max_positions
    if limit is not None and sequence_tokens > limit:
        raise PlanError(
            f"batch.sequence_tokens={sequence_tokens} is more than the model's {limit} positions. "
            f"Use {limit} or fewer, or set model.config.max_position_embeddings."
        )
