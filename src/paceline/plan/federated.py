"""What a federated run needs of the rest of the config."""

from typing import Any

from paceline.config import Config, strategy_name
from paceline.errors import PlanError


def check_federated(config: Config) -> None:
    """``PlanError`` for clients without a federated sync, or without clients, and for what rounds do not go with."""
    if not config.in_rounds:
        if config.data.clients is not None:
            raise PlanError("data.clients is for sync=federated. Set sync, or leave data.clients out")
        return
    if len(config.syncs) > 1:
        raise PlanError("sync: federated as one of several levels is not built. Use it alone, with any layout")
    if config.data.clients is None:
        raise PlanError(
            "sync=federated needs data.clients, which says who owns what: {by: natural} for each file a client, or "
            "{by: dirichlet, count: 100}"
        )
    for problem in _problems(config):
        raise PlanError(problem)


def check_processes(config: Config, *, deadline_s: float | None = None) -> None:
    """``PlanError`` for what clients in processes of their own cannot do. ``deadline_s``: of the server."""
    if not config.in_rounds:
        raise PlanError(f"sync={strategy_name(config.syncs[-1])} has no clients. Set sync=federated")
    check_federated(config)
    sync: Any = config.syncs[-1]
    clients = config.data.clients
    assert clients is not None
    layout = config.layout
    cut = [axis for axis in ("shard", "tensor", "pipeline", "context", "expert") if getattr(layout, axis) > 1]
    rules: list[tuple[bool, str]] = [
        (
            clients.by != "natural" or clients.count is not None,
            "data.clients makes clients up, and clients in processes of their own have what they have. Use {by: "
            "natural}, without count",
        ),
        (
            config.all_replicas > 1 or bool(cut),
            f"{'replicas' if config.all_replicas > 1 else f'layout.{min(cut, default=None)}'}: the server, and each "
            "client in a process of its own, is one rank. Leave it out",
        ),
        (
            bool(sync.speed_spread or sync.deadline),
            "sync.speed_spread and sync.deadline are of simulated clients. Leave them out; --deadline-s of the server "
            "is in seconds",
        ),
        (
            sync.buffer is not None or sync.scaffold or sync.moments == "keep",
            f"sync.{'buffer' if sync.buffer else 'scaffold' if sync.scaffold else 'moments=keep'} with clients in "
            "processes of their own is not built. Simulate it, or leave it out",
        ),
        (
            deadline_s is not None and (sync.privacy is not None or sync.aggregate.is_robust),
            f"--deadline-s leaves clients out, and sync.{'privacy' if sync.privacy else 'aggregate'} counts on all "
            "that were drawn. Leave one of them out",
        ),
        (
            config.data.tokenizer is None and (config.model is None or config.model.path is None),
            "no client may see the text of all, from which a tokenizer would be trained. Set data.tokenizer to a "
            "folder with one, such as the export of an earlier run, or model.path",
        ),
    ]
    for is_bad, problem in rules:
        if is_bad:
            raise PlanError(problem)


def _problems(config: Config) -> list[str]:
    optimizer: Any = config.optimizer
    schedule: Any = config.schedule
    sync: Any = config.syncs[-1]
    objective: Any = config.objective
    name = f"optimizer={strategy_name(config.optimizer)}"
    rules: list[tuple[bool, str]] = [
        (
            config.data.split != "sample",
            f"data.split={config.data.split}: with sync=federated documents are dealt out by data.clients. Use sample",
        ),
        (
            any(source.weight != 1.0 for source in config.data.sources),
            "data.source has weights, but the rows of a client are drawn alike. Leave the weights out",
        ),
        (
            config.precision in ("fp16", "bf16_pure"),
            f"precision={config.precision}: clients that begin anew in every round would need a loss scale, or a "
            "rounding, of their own. Use precision=bf16 or fp32",
        ),
        (
            config.batch.warmup is not None,
            "batch.warmup grows the batch of a step, and a step of sync=federated is a round. Leave it out",
        ),
        (
            config.spikes is not None,
            "spikes leaves out batches after a leap, and clients of sync=federated are drawn by round. Leave it out",
        ),
        (
            schedule.unit != "steps",
            f"schedule.unit={schedule.unit}: a round of sync=federated is one step of the schedule. Use unit=steps",
        ),
        (
            schedule.measures == "change",
            f"schedule={strategy_name(schedule)} follows how far a step of the optimizer moves weights, and a step of "
            "sync=federated is a round. Use another schedule",
        ),
        (
            optimizer.averages or optimizer.remakes or optimizer.sees == "loss",
            f"{name} goes on from sums of its own, and a client of sync=federated begins anew. Use sgd or adamw",
        ),
        (
            config.regularisation.momentum > 0,
            "regularisation.momentum remembers the last update, and a client of sync=federated begins anew. Leave it "
            "out",
        ),
        (
            getattr(objective, "mixes_rows", False),
            f"objective={strategy_name(objective)} mixes rows of one step, and these are one client's. Leave mixup out",
        ),
    ]
    if sync.proximal:
        rules.append(
            (
                optimizer.sees == "gradients",
                f"sync.proximal: {name} asks for other gradients of the batch, which the pull to the others' weights "
                "would change. Use adamw",
            )
        )
    if sync.privacy is not None:
        rules.append(
            (
                config.early_stop is not None,
                "early_stop goes back to earlier weights, and sync.privacy counts the rounds up to the last. Leave one "
                "of them out",
            )
        )
    if sync.scaffold:
        is_plain = strategy_name(config.optimizer) == "sgd" and not optimizer.momentum and not optimizer.groups
        rules.append(
            (
                not is_plain or bool(optimizer.weight_decay),
                f"sync.scaffold is defined for plain SGD, not for {name} as it is set. Use optimizer={{name: sgd}} "
                "without momentum, decay or groups",
            )
        )
    return [problem for is_bad, problem in rules if is_bad]
