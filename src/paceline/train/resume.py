"""What a run goes on from, and whether that is the same run, on all replicas."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

from paceline.checkpoint import Checkpoint, check_space, load, newest, steps
from paceline.config import strategy_name
from paceline.errors import CheckpointError, TrainError
from paceline.optim.base import Averaging
from paceline.sync.base import differing
from paceline.train.assemble import Parts


def find(folder: Path, resume: str | int) -> Checkpoint | None:
    """The checkpoint a run continues from, or None for a new run.

    ``auto``: the newest complete one if there is one; ``never``: none, and ``CheckpointError`` if there is one; a
    number: that step.
    """
    if resume == "never":
        if known := steps(folder):
            raise CheckpointError(
                f"checkpoint.resume=never, but {folder.parent} already holds a run (step {known[-1]}); choose another "
                "train.output, or checkpoint.resume=auto to continue it"
            )
        return None
    if resume == "auto":
        step = newest(folder)
        return None if step is None else load(folder, step)
    return load(folder, int(resume))


def identity(parts: Parts) -> dict[str, Any]:
    """What must be the same for a run to go on: the rest of the config may change between its parts.

    The position in the data is one number, so all that the order follows from is among it.
    """
    config = parts.config
    return {
        "seed": config.seed,
        "data": parts.prepared.fingerprint,
        "data.split": config.data.split,
        "weights of data.source": [source.weight for source in config.data.sources],
        "batch.sequence_tokens": config.batch.sequence_tokens,
        "file_streams": parts.file_streams,
        "clients and rounds": parts.clients,
        "objective": strategy_name(config.objective),
        "optimizer": strategy_name(config.optimizer),
        "dtype of what learns": parts.precision.stored,
        "a penalty on momentum": config.regularisation.momentum > 0 or None,
    }


def check_same_run(checkpoint: Checkpoint, parts: Parts) -> None:
    """Raise ``CheckpointError`` if a checkpoint is of another run."""
    for key, now in identity(parts).items():
        if checkpoint.values.get(key) != now:
            raise CheckpointError(
                f"step {checkpoint.step} in {parts.config.train.output!r} was trained with "
                f"{key}={checkpoint.values.get(key)!r}, this config has {now!r}: that is another run. Restore "
                "the config, or choose another train.output."
            )


def check_same_everywhere(parts: Parts, step: int) -> None:
    """Refuse, on all replicas, to train on other data or from another step than replica 0 does."""
    digest = blake2b(f"{step} {parts.prepared.fingerprint}".encode(), digest_size=16).digest()
    if others := differing(parts.world.link, digest, parts.world.device.torch_device):
        raise TrainError(
            f"replica(s) {others} have other data, or continue from another step, than replica 0; every machine "
            "needs the same files, and sees the same train.output"
        )


def check_room(parts: Parts, folder: Path) -> None:
    """Raise ``CheckpointError`` unless two checkpoints fit: the newest stays while the next is written beside it."""
    replica = parts.built.replica  # weights, copies of them, and the optimizer
    copies = 1 + sum(map(bool, (parts.average.tensors, isinstance(replica.optimizer, Averaging), replica.adjusted())))
    needed = 4 * copies * parts.sizes.trainable + parts.optimizer_config.state_bytes(parts.shapes)
    check_space(folder, 2 * needed * parts.variant.count)
