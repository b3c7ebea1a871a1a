"""What going back and ending early need of the rest of the config."""

from paceline.config import Config
from paceline.errors import PlanError


def check_policies(config: Config) -> None:
    """``PlanError`` for a policy without what it goes by."""
    if config.spikes is not None and config.checkpoint.every == 0:
        raise PlanError(
            "spikes goes back to a checkpoint, and checkpoint.every=0 saves none before the end. Use "
            "checkpoint.every=100 or so, or leave spikes out"
        )
    if config.spikes is not None and not config.keeps_equal:
        raise PlanError(
            f"{config.learning_alone}: replicas that learn alone have losses of their own, and spikes would have each "
            "go back by itself. Use sync=all_reduce, or leave spikes out"
        )
    if config.early_stop is not None and not (config.evaluate.every and config.data.held_out):
        raise PlanError(
            f"early_stop follows the held-out loss, but evaluate.every={config.evaluate.every} and "
            f"data.held_out={config.data.held_out:g}. Set both above 0, or leave early_stop out"
        )
