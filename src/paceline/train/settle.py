"""``sync: auto`` becomes a strategy before anything else is planned: everything later sees its name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from paceline.config import Config, Options, choose
from paceline.errors import PlanError
from paceline.models.describe import describe
from paceline.plan.run import plan_run
from paceline.registry import SYNCS
from paceline.sync.auto import Auto, words
from paceline.sync.base import Load
from paceline.train.assemble import model_sizes, resolve_model, wanted_vocabulary

ASSUMED_FLOPS_PER_S = 1e11
"""Of a rank, where the config does not say how long a step computes."""
VALUE_BYTES = {"fp32": 4, "bf16": 2}


def settle(config: Config, module: nn.Module | None = None, *, say: Callable[[str], None] = lambda _: None) -> Config:
    """The config with every ``auto`` replaced by what it chooses; ``say`` is told why. A function of both alone.

    ``module``: the model, where the config names none.
    """
    if not any(isinstance(sync, Auto) for sync in config.syncs) or (module is None and config.model is None):
        return config
    model, vocabulary = _described(config) if module is None else (module, 0)
    settled = config
    for level, sync in enumerate(config.syncs):
        if isinstance(sync, Auto):
            settled = _with(settled, level, choose(SYNCS, "all_reduce"))
    shapes = {info.name: info.shape for info in describe(model) if info.trainable}
    grid, batch = plan_run(settled)
    flops = model_sizes(model, vocabulary).flops_per_token(batch.sequence_tokens) * batch.tokens
    assumed_s = flops / (config.all_replicas * grid.ranks) / ASSUMED_FLOPS_PER_S
    for level, auto in enumerate(config.syncs):
        if isinstance(auto, Auto):
            load = Load(
                shapes=shapes,
                members=config.group_sizes[level],
                steps=config.train.steps,
                value_bytes=VALUE_BYTES[config.reduction],
                compute_s=auto.compute_ms / 1e3 if auto.compute_ms else assumed_s,
            )
            found = auto.candidates(load, partial(_allows, settled, level))
            settled = _with(settled, level, found[0].options)
            say(words(auto, load, found))
    return settled


def _described(config: Config) -> tuple[nn.Module, int]:
    source = resolve_model(config)
    assert source is not None, "a config without a model needs a module"
    vocabulary = wanted_vocabulary(config, source)
    if source.vocabulary is None and vocabulary is not None:
        source = source.with_vocabulary(vocabulary)
    return source.meta(), source.vocabulary or 0


def _with(config: Config, level: int, options: Options) -> Config:
    """The config with another sync at one level."""
    if not isinstance(config.sync, tuple):
        return config.model_copy(update={"sync": options})
    return config.model_copy(update={"sync": (*config.sync[:level], options, *config.sync[level + 1 :])})


def _allows(config: Config, level: int, options: Any) -> bool:
    """Whether a strategy goes with the rest of the config at one level."""
    if level < len(config.syncs) - 1 and not options.keeps_equal:
        return False
    try:
        plan_run(_with(config, level, options))
    except PlanError:
        return False
    return True
