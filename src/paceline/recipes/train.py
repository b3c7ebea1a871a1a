"""``paceline train``: from a config to a trained model, its checkpoints, its export and its report."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.comm.device import claim as claim_device
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, World, join
from paceline.config import Config
from paceline.errors import ConfigError
from paceline.export import hugging_face
from paceline.launch import torchrun
from paceline.launch.local import LocalRun
from paceline.plan.layout import Grid
from paceline.plan.run import plan_run
from paceline.recipes import folder as run_folder
from paceline.recipes.prepare import prepare_in_child
from paceline.sync.server.keep import ServerProcesses
from paceline.sync.server.serve import Durability
from paceline.track import RunInfo, Tracker
from paceline.track.report import write_report
from paceline.track.terminal import display
from paceline.train.assemble import assemble
from paceline.train.clients import check_extras
from paceline.train.policy import StopRequest
from paceline.train.records import open_records
from paceline.train.settle import settle
from paceline.train.trainer import Loop, find
from paceline.workers.process import Line

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    output: str
    step: int
    """That the weights are of."""
    steps: int
    is_done: bool
    """By the last step, or by early stopping; False for a run that was asked to stop before."""
    loss: float | None = None
    """Of the last step of this process; None if the run was complete already."""
    held_out_loss: float | None = None
    bits_per_byte: float | None = None
    first_loss_s: float | None = None
    """Seconds from the start to the first loss; under torchrun without its own start and imports."""
    seconds: float = 0.0
    """Of the whole run, counted in the same way."""

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def run(config: Config, *, debug: bool = False, say: Say = print) -> Result | None:
    """Run a config to its end on this machine, or as the rank that torchrun made this process.

    Under torchrun only the leader returns a result.
    """
    if config.model is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    config = settle(config, say=say if torchrun.is_leader() else lambda _: None)
    grid, _ = plan_run(config)
    check_extras(config)
    ranks = grid.ranks
    find(Path(config.train.output) / "checkpoints", config.checkpoint.resume)  # what cannot be resumed fails at once
    if torchrun.started_by_torchrun():
        return _train_as_rank(config, ranks, say)
    with run_folder.claim(config.train.output) as output:
        return _train_here(config, ranks, output, debug=debug, say=say)


def _train_here(config: Config, ranks: int, output: Path, *, debug: bool, say: Say) -> Result:
    """Fork the ranks from a process that has imported everything, and show what they report."""
    start = time.perf_counter()
    prepare_in_child(config, output / "logs" / "prepare.log", say=say, debug=debug)
    local = LocalRun(
        _RankMain(config),
        places(config, ranks),
        port=config.train.port,
        logs=output / "logs",
        debug=debug,
        servers=parameter_servers(config, output),
        is_elastic=config.is_elastic,
    )
    shown: Tracker | None = None
    first_loss_s = None
    done: dict[str, Any] = {}
    try:
        run_folder.write_processes(output, _processes(local))
        for rank, message in local.messages():
            if rank != 0:
                continue
            match message:
                case {"kind": "info", "info": info}:
                    shown = display(config.track.display, RunInfo(**info), sys.stdout)
                case {"kind": "done", "result": result}:
                    done = result
                case {"kind": "lost", "message": message}:
                    say(message)
                case {"kind": "step" | "evaluation" | "event" as kind, "record": record}:
                    if first_loss_s is None and kind == "step":
                        first_loss_s = time.perf_counter() - start
                    shown = shown and _show(shown, kind, record)
    finally:
        local.kill()  # whatever went wrong here, no rank stays behind
        if shown:
            with suppress(OSError):
                shown.close()
    return Result(**{**done, "first_loss_s": first_loss_s, "seconds": time.perf_counter() - start})


def parameter_servers(config: Config, output: Path) -> ServerProcesses | None:
    """What is to be started beside the ranks; None for a sync that wants no servers."""
    sync: Any = config.sync
    if not getattr(sync, "is_served", False) or config.all_replicas == 1:
        return None
    folder = output / "servers"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that is over: checkpoints are what a run goes on from
    kept = Durability(folder=None if sync.durability == "none" else folder, fsync=sync.durability == "host")
    return ServerProcesses(sync.servers, kept)


def _show(shown: Tracker, kind: str, record: Mapping[str, Any]) -> Tracker | None:
    """Tell the display; one whose terminal is gone (`paceline train | head`) is dropped, and training goes on."""
    try:
        getattr(shown, kind)(record)
    except OSError:
        return None
    return shown


def places(config: Config, ranks: int) -> list[Coordinates]:
    """Who the ranks of a run on this machine are."""
    world = config.all_replicas * ranks
    return [
        Coordinates.of(rank, replicas=config.all_replicas, ranks=ranks, local_rank=rank, local_ranks=world)
        for rank in range(world)
    ]


def _processes(local: LocalRun) -> list[dict[str, Any]]:
    launcher = {"pid": os.getpid(), "role": "launcher", "replica": None, "rank": None}
    return [launcher] + [
        {"pid": rank.pid, "role": "rank", "replica": rank.coordinates.replica, "rank": rank.coordinates.rank}
        for rank in local.ranks
    ]


def _train_as_rank(config: Config, ranks: int, say: Say) -> Result | None:
    coordinates = torchrun.coordinates(config.all_replicas, ranks)
    claim = run_folder.claim(config.train.output) if coordinates.is_leader else nullcontext()
    with claim, torchrun.rendezvous(coordinates) as rendezvous:
        result = run_rank(config, coordinates, rendezvous, say=say if coordinates.is_leader else lambda _: None)
    return result if coordinates.is_leader else None


@dataclass(frozen=True)
class _RankMain:
    """What each local rank runs. A class, so that a spawned process can receive it."""

    config: Config

    def __call__(self, coordinates: Coordinates, rendezvous: Rendezvous, line: Line) -> None:
        result = run_rank(self.config, coordinates, rendezvous, line=line)
        line.send("done", result=result.values())


class _Forward:
    """Tells the launcher what the leader's trackers are told; the launcher has the terminal."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._line.send("step", record=dict(metrics))

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._line.send("evaluation", record=dict(evaluation))

    def event(self, event: Mapping[str, Any]) -> None:
        self._line.send("event", record=dict(event))

    def close(self) -> None:
        """The line outlives the trackers."""


def run_rank(
    config: Config,
    coordinates: Coordinates,
    rendezvous: Rendezvous | None,
    *,
    line: Line | None = None,
    say: Say = print,
) -> Result:
    """Train as one rank; the leader also keeps the records, the export and the report."""
    start = time.perf_counter()
    stop_request = StopRequest()  # before all that takes long: who is asked to stop meanwhile makes one step and saves
    stop_request.listen(signal.SIGTERM, *([signal.SIGINT] if line is None else []))
    device = claim_device(coordinates)
    with (
        join(coordinates, device, rendezvous, Grid.of(config.layout), config.group_sizes) as world,
        Loop(assemble(config, world, say=say), stop_request=stop_request) as loop,
    ):
        processes = _all_processes(world) if line is None else None
        if coordinates.is_leader:
            info = open_records(loop, display=line is None, extra=[_Forward(line)] if line else [])
            if line:
                line.send("info", info=asdict(info))
            if processes is not None:
                run_folder.write_processes(Path(config.train.output), processes)
        loss = first_loss_s = None
        for event in loop.steps():
            loss = event.loss
            first_loss_s = first_loss_s or time.perf_counter() - start
        loop.finish_saving()
        if coordinates.is_leader:
            _leave_results(loop)
        newest = loop.evaluation
        return Result(
            output=config.train.output,
            step=loop.step,
            steps=config.train.steps,
            is_done=loop.is_done,
            loss=loss,
            held_out_loss=newest.loss if newest else None,
            bits_per_byte=newest.bits_per_byte if newest else None,
            first_loss_s=first_loss_s,
            seconds=time.perf_counter() - start,
        )


def _all_processes(world: World) -> list[dict[str, Any]]:
    """Every rank that a launcher of its own started, as they tell each other through the store; the leader's answer."""
    own = {"pid": os.getpid(), "role": "rank", "replica": world.coordinates.replica, "rank": world.coordinates.rank}
    if world.store is None:
        return [own]
    world.store.set(f"process/{world.coordinates.global_rank}", json.dumps(own))
    if not world.coordinates.is_leader:
        return []
    return [json.loads(world.store.get(f"process/{rank}")) for rank in range(world.coordinates.global_ranks)]


def _leave_results(loop: Loop) -> None:
    """The Hugging Face folder and the report."""
    output = Path(loop.parts.config.train.output)
    assert loop.trackers is not None
    if loop.parts.source is not None:
        hugging_face.write(output / "export", loop.weights(), loop.parts.source, loop.parts.prepared.tokenizer)
        averaged = " (the average of the weights)" if loop.parts.average.is_exported else ""
        loop.trackers.event("export", f"{output / 'export'}{averaged}", step=loop.step)
        if not hugging_face.reads_as_trained(output / "export"):
            text = (
                f"transformers' AutoTokenizer splits text otherwise for {loop.parts.source.family} models than in "
                f"training; load PreTrainedTokenizerFast.from_pretrained({str(output / 'export')!r}) instead"
            )
            loop.trackers.event("warning", text, step=loop.step)
    if loop.is_done:
        loop.trackers.event("done", f"{loop.step} steps", step=loop.step)
    write_report(output)
