"""What a config says of the rate, the growing batch and the weights, in words and numbers for the plan."""

from typing import Any

from paceline.config import Config, strategy_name
from paceline.plan.batch import Batches
from paceline.train.rate import Rate


def rates(config: Config, batches: Batches) -> dict[str, float]:
    """The rate of the first step, the peak at the full batch, and the rate of the last step where it is known."""
    schedule: Any = config.schedule
    optimizer: Any = config.optimizer
    rate, steps = Rate(config, batches), config.train.steps
    found = {
        "first": optimizer.lr * rate.factor(1, 0),
        "peak": optimizer.lr * schedule.scaled(batches.full.sequences),
    }
    if schedule.measures is None:
        found["last"] = optimizer.lr * rate.factor(steps, batches.sequences(1, steps - 1))
    return found


def rate_words(config: Config, batches: Batches) -> str:
    """The rates, and where the peak comes from."""
    schedule: Any = config.schedule
    optimizer: Any = config.optimizer
    found, sequences = rates(config, batches), batches.full.sequences
    last = f"{found['last']:.3g} in the last" if "last" in found else "then by what is measured"
    why = ""
    if schedule.base_sequences is not None:
        scale = (
            f"{schedule.scaled(sequences):.3g} ({schedule.scale}: {sequences} sequences for {schedule.base_sequences})"
        )
        why = f" = {optimizer.lr:.3g} x {scale}"
    return f"{found['first']:.3g} in step 1, peak {found['peak']:.3g}{why}, {last}"


def growth_words(config: Config, batches: Batches) -> str | None:
    """How the batch grows; None for one that does not."""
    grows, first = config.batch.warmup, batches.at(1)
    if grows is None:
        return None
    many = "" if config.batch.micro == "auto" else f"{first.micro_batches} micro-batch(es) x "
    return (
        f"from {first.sequences} sequences = {first.data_parallel} rank(s) x {many}{first.micro} in step 1, "
        f"by {grows.by} at a time, full from step {grows.steps + 1:,} on"
    )


def average_words(config: Config) -> str | None:
    """What is averaged, and for what; None for no average."""
    average: Any = config.average
    if not average.keeps:
        return None
    taken = "at the end of each cycle" if average.every == "cycle" else f"every {average.every} step(s)"
    used = [what for what, is_used in (("evaluation", average.evaluate), ("export", average.export)) if is_used]
    return f"{strategy_name(average)}, {taken}, for {' and '.join(used) or 'the checkpoints alone'}"


def policy_words(config: Config) -> str | None:
    """When the run goes back, and when it ends early; None for neither."""
    words = []
    if (spikes := config.spikes) is not None:
        words.append(f"back to a checkpoint after {spikes.patience} leap(s) of the loss")
    if (early := config.early_stop) is not None:
        words.append(f"an end after {early.patience} measurements without a better held-out loss")
    return ", ".join(words) or None


def perturb_words(config: Config) -> str | None:
    """What is done to the weights, and when; None for nothing."""
    perturb = config.perturb
    if perturb is None:
        return None
    when = "the end of each cycle" if perturb.at == "cycle" else f"step(s) {', '.join(map(str, perturb.at))}"
    return f"{perturb.shrink:g} x weights + {perturb.noise:g} x new first values, after {when}"
