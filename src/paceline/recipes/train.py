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
from typing import Any, Literal, Protocol

from paceline.comm.device import claim as claim_device
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, World, join
from paceline.config import Config
from paceline.errors import ConfigError, PlanError
from paceline.export import hugging_face
from paceline.launch import ray as ray_run
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
from paceline.train.resume import find
from paceline.train.settle import settle
from paceline.train.trainer import Loop

Say = Callable[[str], None]
Engine = Literal["here", "ray"]


class Teller(Protocol):
    """A rank's way to who started it."""

    def send(self, kind: str, **content: Any) -> None:
        """Send a message."""


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

    @classmethod
    def of(cls, loop: Loop, loss: float | None, **times: Any) -> "Result":
        """Of a loop that has ended."""
        newest = loop.evaluation
        return cls(
            output=loop.parts.config.train.output,
            step=loop.step,
            steps=loop.parts.config.train.steps,
            is_done=loop.is_done,
            loss=loss,
            held_out_loss=newest.loss if newest else None,
            bits_per_byte=newest.bits_per_byte if newest else None,
            **times,
        )

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def run(config: Config, *, on: Engine = "here", debug: bool = False, say: Say = print) -> Result | None:
    """Run a config to its end on this machine, on a Ray cluster, or as the rank that torchrun made this process.

    Under torchrun only the leader returns a result.
    """
    if config.model is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    config = settle(config, say=say if torchrun.is_leader() else lambda _: None)
    grid, _ = plan_run(config)
    check_extras(config)
    ranks = grid.ranks
    find(Path(config.train.output) / "checkpoints", config.checkpoint.resume)  # what cannot be resumed fails at once
    if on == "ray":
        ray_run.check()
    if torchrun.started_by_torchrun():
        if on != "here":
            raise PlanError(f"--on {on} under torchrun: both start ranks. Use one of them")
        return _train_as_rank(config, ranks, say)
    with run_folder.claim(config.train.output) as output:
        return _train(config, ranks, output, on, debug=debug, say=say)


def _train(config: Config, ranks: int, output: Path, on: Engine, *, debug: bool, say: Say) -> Result:
    """Start the ranks, here as forks of a process that has imported everything, and show what they report."""
    start = time.perf_counter()
    prepare_in_child(config, output / "logs" / "prepare.log", say=say, debug=debug)
    started = _started(config, ranks, output, on, debug=debug)
    shown: Tracker | None = None
    first_loss_s = None
    done: dict[str, Any] = {}
    try:
        run_folder.write_processes(output, _processes(started))
        for rank, message in started.messages():
            if rank != 0:
                continue
            match message:
                case {"kind": "again", "text": text}:
                    say(text)
                case {"kind": "info", "info": info}:
                    run_folder.write_processes(output, _processes(started))
                    if shown:
                        shown.close()
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
        started.kill()  # whatever went wrong here, no rank stays behind
        if shown:
            with suppress(OSError):
                shown.close()
    return Result(**{**done, "first_loss_s": first_loss_s, "seconds": time.perf_counter() - start})


def _started(config: Config, ranks: int, output: Path, on: Engine, *, debug: bool) -> LocalRun | ray_run.RayRun:
    every, logs = places(config, ranks), output / "logs"
    if on == "ray":
        wanted = _wanted_servers(config, output)
        return ray_run.RayRun(_RankMain(config), every, port=config.train.port, logs=logs, servers=wanted)
    servers = parameter_servers(config, output)
    return LocalRun(
        _RankMain(config),
        every,
        port=config.train.port,
        logs=logs,
        debug=debug,
        servers=servers,
        is_elastic=config.is_elastic,
    )


def parameter_servers(config: Config, output: Path) -> ServerProcesses | None:
    """What is to be started beside the ranks; None for a sync that wants no servers."""
    wanted = _wanted_servers(config, output)
    return None if wanted is None else ServerProcesses(*wanted)


def _wanted_servers(config: Config, output: Path) -> tuple[int, Durability] | None:
    """How many servers, and where they keep their logs."""
    sync: Any = config.sync
    if not sync.is_served or config.all_replicas == 1:
        return None
    folder = output / "servers"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that is over: checkpoints are what a run goes on from
    kept = Durability(folder=None if sync.durability == "none" else folder, fsync=sync.durability == "host")
    return sync.servers, kept


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


def _processes(started: LocalRun | ray_run.RayRun) -> list[dict[str, Any]]:
    launcher = {"pid": os.getpid(), "role": "launcher", "replica": None, "rank": None}
    servers = started.servers if isinstance(started, ray_run.RayRun) else []
    return [
        launcher,
        *({"pid": pid, "role": "server", "replica": None, "rank": None} for pid in servers),
        *(
            {"pid": rank.pid, "role": "rank", "replica": rank.coordinates.replica, "rank": rank.coordinates.rank}
            for rank in started.ranks
        ),
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

    def __call__(
        self, coordinates: Coordinates, rendezvous: Rendezvous, line: Teller, stop_request: StopRequest | None = None
    ) -> None:
        result = run_rank(self.config, coordinates, rendezvous, line=line, stop_request=stop_request)
        line.send("done", result=result.values())


class _Forward:
    """Tells the launcher what the leader's trackers are told; the launcher has the terminal."""

    def __init__(self, line: Teller) -> None:
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
    line: Teller | None = None,
    stop_request: StopRequest | None = None,
    say: Say = print,
) -> Result:
    """Train as one rank; the leader also keeps the records, the export and the report."""
    start = time.perf_counter()
    stop_request = (
        stop_request or StopRequest()
    )  # before all that takes long: who is asked to stop meanwhile makes one step and saves
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
            leave_results(loop)
        return Result.of(loop, loss, first_loss_s=first_loss_s, seconds=time.perf_counter() - start)


def _all_processes(world: World) -> list[dict[str, Any]]:
    """Every rank that a launcher of its own started, as they tell each other through the store; the leader's answer."""
    own = {"pid": os.getpid(), "role": "rank", "replica": world.coordinates.replica, "rank": world.coordinates.rank}
    if world.store is None:
        return [own]
    world.store.set(f"process/{world.coordinates.global_rank}", json.dumps(own))
    if not world.coordinates.is_leader:
        return []
    return [json.loads(world.store.get(f"process/{rank}")) for rank in range(world.coordinates.global_ranks)]


def leave_results(loop: Loop) -> None:
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
