"""What an optimizer does not go with, as far as the config says it."""

from typing import Any

from paceline.config import Config, strategy_name
from paceline.errors import PlanError
from paceline.plan.adjustments import asked_adjustments
from paceline.plan.precision import PRECISIONS

CUTS = ("shard", "tensor", "pipeline", "context")


def check_optimizer(config: Config) -> None:
    """Raise ``PlanError`` for a layout, a schedule or a setting with which the optimizer would not do what it is."""
    optimizer: Any = config.optimizer
    average: Any = config.average
    name = f"optimizer={strategy_name(config.optimizer)}"
    if optimizer.schedule is not None and (schedule := strategy_name(config.schedule)) != optimizer.schedule:
        raise PlanError(
            f"{name} averages weights in place of a schedule, and schedule={schedule} would do it again. Use "
            f"schedule={optimizer.schedule}, with its warmup_steps"
        )
    precision = PRECISIONS.get(config.precision)  # none for auto, which the device decides
    if optimizer.averages and precision is not None and precision.is_pure:
        raise PlanError(
            f"precision={config.precision}: {name} finds its averages from weights that may not be rounded. Use "
            "precision=bf16"
        )
    if optimizer.averages and average.keeps:
        raise PlanError(
            f"average={strategy_name(config.average)}: {name} keeps an average of its own, which is measured and "
            "exported. Use average=none"
        )
    if optimizer.averages and config.perturb is not None:
        raise PlanError(f"perturb: {name} computes its average from weights that only it may move. Leave perturb out")
    if optimizer.remakes and config.perturb is not None:
        raise PlanError(f"perturb: {name} makes the weights anew from its own sums. Leave perturb out")
    if not config.keeps_equal and (optimizer.remakes or optimizer.sees == "loss"):
        raise PlanError(f"{config.learning_alone}: {name} {_why_not_alone(optimizer)}. Use sync=all_reduce")
    if config.keeps_equal and not config.is_exact and (optimizer.asks_again or optimizer.sees == "loss"):
        raise PlanError(
            f"sync.reducer: {name} asks for other gradients of the batch besides that of the step, into which a "
            "reducer would mix what it has left out. Use reducer=mean, or another optimizer"
        )
    if optimizer.exchanges and config.keeps_equal and not config.is_exact:
        _check_exchange(config, name)
    if optimizer.sees != "loss":
        return
    for axis in CUTS:
        if (size := getattr(config.layout, axis)) > 1:
            raise PlanError(
                f"layout.{axis}={size}: {name} looks at the loss of the whole model again and again, which a part of "
                "it does not have. Use replicas, or another optimizer"
            )
    for section, key, value in asked_adjustments(config):
        off = "null" if key.startswith("clip") or key == "max_norm" else "0"
        raise PlanError(
            f"{section}.{key}={value}: {name} compares gradients with each other and with the loss, and one that is "
            f"adjusted is another. Use {section}.{key}={off}"
        )
    if precision is not None and precision.compute_bytes == 2:
        raise PlanError(f"precision={config.precision}: {needs_fp32(name)}")
    if optimizer.differentiates_twice and config.train.compile:
        raise PlanError(f"train.compile=true: {name} differentiates twice, which compiled blocks do not. Use false")
    if optimizer.differentiates_twice and config.layout.recompute != "none":
        raise PlanError(
            f"layout.recompute={config.layout.recompute}: {name} differentiates twice, for which all activations are "
            "needed at once. Use recompute=none"
        )


def _check_exchange(config: Config, name: str) -> None:
    """For an optimizer that has its averages summed in place of gradients."""
    syncs: Any = config.syncs
    if len(syncs) > 1:
        raise PlanError(
            f"sync: {name} has its average summed in place of gradients, once: over one level. Use one level, or "
            "optimizer=adamw"
        )
    if syncs[0].exact_steps == 0:
        raise PlanError(
            f"sync.exact_steps=0: {name} learns from exact sums how large gradients are before it has others. Use 15 "
            "to 25 % of train.steps"
        )
    precision = PRECISIONS.get(config.precision)
    if precision is not None and precision.is_pure:
        raise PlanError(f"precision={config.precision}: {name} with a reducer is not built for it. Use precision=bf16")
    for section, key, value in asked_adjustments(config):
        off = "null" if key.startswith("clip") or key == "max_norm" else "0"
        raise PlanError(
            f"{section}.{key}={value}: with a reducer {name} is given its average in place of the gradient, which this "
            f"would change. Use {section}.{key}={off}"
        )


def _why_not_alone(optimizer: Any) -> str:
    if optimizer.remakes:
        return "makes the weights anew from sums of its own, which replicas do not exchange, and forgets their mean"
    return "compares losses of the same batch, of which each replica that learns alone would see another one"


def needs_fp32(name: str) -> str:
    """Why, and how to mend it."""
    return f"{name} compares losses that differ by less than 16 bits can tell. Use precision=fp32"
