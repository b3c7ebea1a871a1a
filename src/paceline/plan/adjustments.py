"""What clipping and penalties do not go with, as far as the config says it."""

from collections.abc import Iterator
from typing import Any

from paceline.config import Config, strategy_name
from paceline.errors import PlanError
from paceline.plan.precision import PRECISIONS

SETS_WEIGHTS = ("l1", "max_norm")
"""Penalties that move weights after the optimizer has; the others are terms of the gradient."""


def asked_adjustments(config: Config) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value of each that the config asks for; what is not asked for is 0 or null."""
    train, regularisation = config.train, config.regularisation
    for section, options, keys in (
        ("train", train, ("clip_value", "clip_block_norm", "clip_norm")),
        ("regularisation", regularisation, tuple(type(regularisation).model_fields)),
    ):
        for key in keys:
            if value := getattr(options, key):
                yield section, key, value


def check_adjustments(config: Config) -> None:
    """Raise ``PlanError`` for a penalty that would not do what it says."""
    optimizer: Any = config.optimizer
    name = f"optimizer={strategy_name(config.optimizer)}"
    precision = PRECISIONS.get(config.precision)  # none for auto, which is never pure
    for section, key, value in asked_adjustments(config):
        if section != "regularisation":
            continue
        asked = f"regularisation.{key}={value}"
        if precision is not None and precision.is_pure:
            raise PlanError(
                f"{asked}: its pull is mostly smaller than precision={config.precision} can tell, and would be rounded "
                "away. Use precision=bf16"
            )
        if optimizer.averages and key in SETS_WEIGHTS:
            raise PlanError(
                f"{asked}: {name} computes its average from weights that only it may move. Use regularisation.l2, or "
                "another optimizer"
            )
        if key == "momentum" and not config.keeps_equal:
            raise PlanError(
                f"{config.learning_alone}: regularisation.momentum would take what replicas agree on for an update, "
                "and pull back from it. Use sync=all_reduce, or leave it out"
            )
        if config.perturb is not None and key == "momentum":
            raise PlanError(
                f"{asked}: it would take perturb for an update, and pull back from it. Leave one of them out"
            )
