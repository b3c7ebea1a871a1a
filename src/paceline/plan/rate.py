"""What the schedule of the rate, the average and the perturbation need of each other and of the run."""

from typing import Any

from paceline.config import Config, strategy_name
from paceline.errors import PlanError


def check_rate(config: Config) -> None:
    """``PlanError`` for what is to happen where nothing ends or after the end, or to follow what is not measured."""
    schedule: Any = config.schedule
    average: Any = config.average
    at = () if config.perturb is None else config.perturb.at
    for key, asked, instead in (("average.every", average.every, "100"), ("perturb.at", at, "[100]")):
        if asked == "cycle" and not schedule.has_cycles:
            raise PlanError(
                f"{key}=cycle, but schedule={strategy_name(schedule)} has no cycles. Use schedule=cosine_restarts or "
                f"cyclic, or name steps, as in {key}={instead}"
            )
    if at != "cycle" and max(at, default=0) >= config.train.steps:
        raise PlanError(f"perturb.at={max(at)} is not before the last of {config.train.steps} steps (train.steps)")
    if average.start >= config.train.steps:
        raise PlanError(f"average.start={average.start} leaves none of {config.train.steps} steps (train.steps)")
    if schedule.measures == "change" and not config.keeps_equal:
        raise PlanError(
            f"{config.learning_alone}: schedule={strategy_name(schedule)} follows how far a replica's weights move, "
            "and replicas that learn alone would take different rates. Use sync=all_reduce, or another schedule"
        )
    if config.perturb is not None and not config.keeps_equal:
        raise PlanError(
            f"{config.learning_alone}: perturb is not built for replicas that learn alone: what they remember of the "
            "last exchange would take it for something learned. Use sync=all_reduce, or leave perturb out"
        )
    if schedule.measures == "held_out" and not (config.evaluate.every and config.data.held_out):
        raise PlanError(
            f"schedule={strategy_name(schedule)} follows the held-out loss, but evaluate.every={config.evaluate.every} "
            f"and data.held_out={config.data.held_out:g}. Set both above 0"
        )
