"""What a run leaves in its folder for people and programs to read; written by the leader."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from paceline.config import strategy_name
from paceline.errors import TrainError
from paceline.plan.model import FLOPS_FORMULA
from paceline.track import RunInfo, Tracker, open_trackers
from paceline.train.assemble import Parts
from paceline.train.trainer import Loop


def open_records(loop: Loop, *, display: bool = True, extra: Sequence[Tracker] = ()) -> RunInfo:
    """Write the resolved config and open the trackers of a loop; steps after the one it continues from are cut.

    ``display=False`` leaves the terminal to someone else, who may listen as one of ``extra``.
    """
    config, output = loop.parts.config, Path(loop.parts.config.train.output)
    info = run_info(loop.parts, loop.step)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "config.yaml", yaml.safe_dump(config.tree(), sort_keys=False, allow_unicode=True, width=120))
    track = config.track if display else config.track.model_copy(update={"display": "none"})
    loop.trackers = open_trackers(output, track, info, extra=extra)
    text = f"{info.precision} on {info.machine}"
    if loop.step:
        loop.trackers.event("resume", f"continues from step {loop.step}; {text}", step=loop.step)
    else:
        loop.trackers.event("start", text, step=0)
    if config.batch.micro == "auto":
        full = loop.parts.batches.full
        text = f"batch.micro=auto: {full.micro} sequence(s) of a rank at once, {full.micro_batches} time(s) a step"
        loop.trackers.event("micro", text, step=loop.step)
    for warning in _warnings(loop.parts):
        loop.trackers.event("warning", warning, step=loop.step)
    return info


def _warnings(parts: Parts) -> Iterator[str]:
    """What a person should know of device and data before the first step."""
    if parts.precision.units and parts.precision.units not in parts.world.device.units:
        yield (
            f"precision={parts.precision.name} was asked for, and {parts.world.device.name} has no "
            f"{parts.precision.units} units: it computes as asked, but more slowly than in fp32"
        )
    statistics = parts.prepared.statistics
    if statistics.quarantined:
        yield f"{statistics.quarantined} row(s) of the data could not be used: {statistics.quarantine}"
    if parts.dropped_tokens > 0.02 * statistics.tokens:
        yield (
            f"{parts.dropped_tokens:,} of {statistics.tokens:,} tokens stand in no row: pieces too short for one; "
            "shorter sequences or another data.split use more"
        )
    if parts.loader.warning:
        yield parts.loader.warning
    if parts.built.by_chance:
        yield (
            f"{parts.built.by_chance}: so all that is random follows from seed, step and micro-batch, and with another "
            "batch.micro or number of replicas something else is drawn"
        )


def run_info(parts: Parts, start_step: int) -> RunInfo:
    """What a display says about the run."""
    config, coordinates = parts.config, parts.world.coordinates
    return RunInfo(
        name=config.train.output,
        model=_model_name(parts),
        parameters=parts.sizes.parameters,
        steps=config.train.steps,
        start_step=start_step,
        replicas=coordinates.replicas,
        ranks=coordinates.ranks,
        precision=parts.precision.name,
        sync=" under ".join(strategy_name(sync) for sync in config.syncs),
        checkpoint_every=config.checkpoint.every,
        machine=f"{parts.world.device.name}, {parts.world.device.threads} thread(s) a rank",
        mfu_formula=f"MFU = ({FLOPS_FORMULA}) x tokens/s / {parts.peak_flops_per_s / 1e9:,.0f} GFLOP/s, the "
        f"{parts.precision.name} matrix-product peak measured on {coordinates.global_ranks} rank(s) at the start",
    )


def _model_name(parts: Parts) -> str:
    named = parts.config.model
    if named is None or parts.source is None:
        return type(parts.built.model).__name__
    return named.preset or (Path(named.path).name if named.path else parts.source.family)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; ``TrainError`` with the system's reason."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainError(f"{path} cannot be written: {error.strerror}; make room or give permission") from None
