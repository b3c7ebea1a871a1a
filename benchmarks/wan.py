"""Syncs on a slow network: time per step, bytes on the wire, and what is learned, on one machine.

    python benchmarks/wan.py [--preset quick|all] [--sync all_reduce --sync '{name: diloco, every: 100}' ...]
                             [--link 100mbit/25ms] [--back LINK] [--loss 0.001] [--jitter 5ms] [--mtu 9000]
                             [--replicas 2] [--steps 200] [--warmup 100] [--compute-ms 30] [--json]

Every sync trains the same Llama of 1.6 M parameters from the same weights on the same batches, as that many replicas of
paceline, each a process with a network of its own; ``emulator.py`` delays and limits what they send each other. Before
each run an all-reduce of 4 bytes, and one of 4 MiB, show that it does, and end the run if not.

    ms/step    from the end of a step to that of the next, on the slowest rank, mean over the steps after ``--warmup``
    compute    share of that time which is not spent in the sync: forward, backward, optimizer, loading. Each step
               sleeps until this has taken ``--compute-ms``, as if the model were larger; ``ms`` is what it took
    wire       bytes that rank 0's network interface has sent a step, with all headers and acknowledgements
    payload    bytes that the sync's closed formula says, which are what the plan shows
    model      ms/step as ``sync: auto`` takes it to be: the compute, and bytes and delays on the link
    loss       held-out, at the last step: all have seen the same tokens
    dropped    packets, and the latest that one was handed on after it was due: a machine that is busy spoils the times

A period (``every``) should divide ``--steps`` and ``--warmup``, for the last step of a run ends with an exchange too.
Where the machine does not allow network namespaces this is refused. There is no weaker stand-in: gloo's members tell
each other where to connect in a form of its own, into which no proxy fits, and a sleep inside the link would be a model
of a network, where this is to measure one.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import emulator
import yaml
from emulator import INTERFACE, PORT, Forbidden, Side, Weather, address, sides
from meter import PROBE_BYTES, Meter, Probe, probe

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import Config, strategy_name
from paceline.errors import ConfigError, PlanError
from paceline.models.describe import describe
from paceline.plan.layout import Grid
from paceline.plan.network import Network
from paceline.recipes.prepare import prepare_in_child
from paceline.sync.base import delays
from paceline.sync.rows import PRESETS, ROWS
from paceline.train.assemble import assemble, resolve_model
from paceline.train.settle import settle
from paceline.train.trainer import Loop
from paceline.workers.process import Child, Line, told_error

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""1.6 M parameters, 6.4 MB of gradients, and so little to compute that the sleep decides how long a step takes."""
SEQUENCES, SEQUENCE_TOKENS = 1, 32
"""Sequences a replica and step."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all syncs of one call of the bench have in common."""

    link: Network
    back: Network
    weather: Weather
    mtu: int
    replicas: int
    steps: int
    warmup: int
    compute_s: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a sync took; bytes and times are of a step."""

    sync: str
    step_s: float
    compute: float
    """Share of that."""
    compute_s: float
    """Median."""
    wire_bytes: float
    payload_bytes: float
    modelled_s: float | None
    loss: float
    probe: Probe
    dropped: int
    late_s: float


def config(sync: Any, given: Conditions, output: str = "unused") -> Config:
    """What is trained."""
    parsed = Config.parse(
        {
            "model": {"config": MODEL},
            "data": {"source": "python-docs"},
            "batch": {"sequences": SEQUENCES * given.replicas, "sequence_tokens": SEQUENCE_TOKENS},
            "optimizer": {"name": "adamw", "lr": 2.0e-3},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "precision": "fp32",
            "replicas": given.replicas,
            "sync": sync,
            "train": {"steps": given.steps, "output": output},
            "track": {"display": "none", "tensorboard": False},
        }
    )
    return settle(parsed, say=print)


def train(line: Line, index: int, router: socket.socket, run: Config, given: Conditions) -> None:
    """One rank, which is one replica."""
    emulator.join(router, index, given.mtu)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    place = Coordinates.of(index, replicas=given.replicas, ranks=1, local_rank=index, local_ranks=given.replicas)
    meet = Rendezvous(host=address(0), port=PORT, timeout_s=120.0, loopback=False)
    store = meet.host_store() if place.is_leader else None
    with join(place, claim(place), meet, Grid.of(run.layout), run.group_sizes) as world:
        line.send("probe", values=asdict(probe(world.link)))
        line.receive()
        parts = assemble(run, world, saves=False, say=lambda _: None)
        meter = Meter(parts.sync, given.compute_s)
        with Loop(replace(parts, sync=meter), hooks=(meter.stepped,)) as loop:  # type: ignore[arg-type]
            for _ in loop.steps():
                pass
            loss = loop.evaluation.loss if loop.evaluation else None
        line.send("result", steps=meter.steps, loss=loss)
        line.receive()  # the store lives in rank 0, and has to outlive the others
    del store


def route(line: Line, channels: Sequence[socket.socket], ends: Sequence[Side], weather: Weather) -> None:
    """The router's process."""
    router = emulator.route(channels, ends, weather, line.connection.fileno())
    line.send("result", dropped=router.dropped, late_s=router.late_s, forwarded=router.forwarded)


def measure(sync: Any, given: Conditions, logs: Path) -> Result:
    """Run one sync. Raises ``Forbidden`` where there can be no network of one's own, or one that does not delay."""
    run = config(sync, given, str(logs / "run"))
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    pairs = [socket.socketpair() for _ in range(given.replicas)]
    ends = sides(given.link, given.back, given.replicas)
    children = [
        Child(f"rank {i}", _Start(train, i, ours, run, given), logs / f"rank-{i}.log", method="fork", debug=False)
        for i, (ours, _) in enumerate(pairs)
    ]
    try:
        channels = [theirs for _, theirs in pairs]
        children.append(
            Child(
                "router", _Start(route, channels, ends, given.weather), logs / "router.log", method="fork", debug=False
            )
        )
        *ranks, router = children
        probed = Probe(**max((told["values"] for told in _told(ranks, "probe")), key=lambda values: values["small_s"]))
        check(probed, given)
        for rank in ranks:
            rank.line.send("go")
        results = _told(ranks, "result")
        router.line.send("stop")
        (routed,) = _told([router], "result")
    finally:
        for child in children:
            child.process.kill()
            child.process.join()
        for channel in (channel for pair in pairs for channel in pair):
            channel.close()
    return _result(run, given, probed, results, routed)


class _Start:
    """A child's main function with its arguments."""

    def __init__(self, main: Any, *arguments: Any) -> None:
        self._main, self._arguments = main, arguments

    def __call__(self, line: Line) -> None:
        try:
            self._main(line, *self._arguments)
        except Forbidden as error:
            line.send("forbidden", text=str(error))


def _told(children: Sequence[Child], kind: str) -> list[Mapping[str, Any]]:
    """The next message of each child, which has to be of this kind."""
    messages: dict[int, Mapping[str, Any]] = {}
    while missing := {child.line.connection: i for i, child in enumerate(children) if i not in messages}:
        for connection in wait(list(missing)):
            child = children[missing[connection]]  # type: ignore[index]
            try:
                message = child.line.receive()
            except (EOFError, ConnectionResetError):
                child.process.join()
                raise RuntimeError(f"{child.name} died: {child.death()}; its log: {child.log}") from None
            if message["kind"] == "forbidden":
                raise Forbidden(message["text"])
            if message["kind"] == "error":
                raise told_error(message, child.log)
            assert message["kind"] == kind, message
            messages[missing[connection]] = message  # type: ignore[index]
    return [messages[i] for i in range(len(children))]


def check(probed: Probe, given: Conditions) -> None:
    """Raise ``Forbidden`` unless the network is as slow as it was asked to be."""
    size = given.replicas
    # Round a ring each of 2 (n - 1) messages waits for the one before it; one in n of them starts at rank 0.
    least = 2 * (size - 1) * (min(given.link.delay_s, given.back.delay_s) if size > 2 else 0.5 * _both(given))
    most_bits_per_s = max(given.link.bits_per_s, given.back.bits_per_s)
    if probed.small_s < 0.98 * least or probed.bits_per_s > 1.02 * most_bits_per_s:
        raise Forbidden(
            f"the network does not delay as it was asked to: 4 bytes took {1e3 * probed.small_s:.1f} ms and not "
            f"{1e3 * least:.1f}, 4 MiB went at {probed.bits_per_s / 1e6:.0f} of {most_bits_per_s / 1e6:.0f} Mbit/s"
        )


def _both(given: Conditions) -> float:
    return given.link.delay_s + given.back.delay_s


def _result(
    run: Config,
    given: Conditions,
    probed: Probe,
    results: Sequence[Mapping[str, Any]],
    routed: Mapping[str, Any],
) -> Result:
    counted = given.steps - given.warmup
    steps = [result["steps"] for result in results]
    window = [rank[given.warmup :] for rank in steps]
    seconds = max(sum(step[0] for step in rank) for rank in window)
    slowest = max(window, key=lambda rank: sum(step[0] for step in rank))
    outside = sum(step[1] for step in slowest)
    before = steps[0][given.warmup - 1][2]
    losses = {result["loss"] for result in results}
    assert len(losses) == 1, losses
    compute_s = statistics.median(step[1] for step in slowest)
    payload, modelled = formulas(run, given, compute_s)
    return Result(
        sync=name_of(run),
        step_s=seconds / counted,
        compute=outside / seconds,
        compute_s=compute_s,
        wire_bytes=(steps[0][-1][2] - before) / counted,
        payload_bytes=payload,
        modelled_s=modelled,
        loss=losses.pop(),
        probe=probed,
        dropped=routed["dropped"],
        late_s=routed["late_s"],
    )


def formulas(run: Config, given: Conditions, compute_s: float) -> tuple[float, float | None]:
    """Payload bytes of a step, and its time; None for a sync that does not say for how many delays it waits."""
    source = resolve_model(run)
    assert source is not None
    shapes = {info.name: info.shape for info in describe(source.meta()) if info.trainable}
    counted = given.steps - given.warmup
    levels: list[Any] = list(zip(run.syncs, run.group_sizes, strict=True))
    sent = sum(sync.wire_bytes(shapes, size, counted) for sync, size in levels)
    waits = [delays(sync, size, counted) for sync, size in levels]
    slower = min(given.link, given.back, key=lambda side: side.bits_per_s)
    link = Network(slower.bits_per_s, _both(given) / 2)
    known = [count for count in waits if count is not None]
    modelled = compute_s + link.seconds(sent, sum(known)) / counted if len(known) == len(waits) else None
    return sent / counted, modelled


def name_of(run: Config) -> str:
    """How a row is called."""
    words = []
    for sync in run.syncs:
        options = sync.model_dump(mode="json", exclude_unset=True)
        words.append(" ".join([strategy_name(sync), *(_short(key, value) for key, value in options.items())]))
    return " under ".join(words)


def _short(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return value.get("name", "+".join(f"{k}={v}" for k, v in value.items()))
    return str(value) if key == "every" else f"{key}={value}"


COLUMNS = {
    "sync": 34,
    "ms/step": 9,
    "compute": 9,
    "ms": 7,
    "wire KiB": 10,
    "payload KiB": 13,
    "wire/payload": 14,
    "model ms": 10,
    "loss": 8,
    "dropped": 9,
    "late ms": 9,
}


def line_of(result: Result | None = None) -> str:
    """A row of the table, or its head."""
    cells = list(COLUMNS)
    if result is not None:
        cells = [
            result.sync,
            f"{1e3 * result.step_s:.1f}",
            f"{result.compute:.1%}",
            f"{1e3 * result.compute_s:.1f}",
            f"{result.wire_bytes / 1024:,.1f}",
            f"{result.payload_bytes / 1024:,.1f}",
            f"{result.wire_bytes / max(1, result.payload_bytes):.4f}",
            f"{1e3 * result.modelled_s:.1f}" if result.modelled_s is not None else "-",
            f"{result.loss:.4f}",
            str(result.dropped),
            f"{1e3 * result.late_s:.1f}",
        ]
    first, *others = zip(cells, COLUMNS.values(), strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)


def compare(syncs: Sequence[Any], given: Conditions) -> list[Result]:
    """One after the other; prints a line as each ends."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="paceline-wan-") as folder:
        prepare_in_child(config("all_reduce", given), Path(folder) / "prepare.log", say=print, debug=False)
        for sync in syncs:
            result = measure(sync, given, Path(folder))
            if not results:
                small, rate = 1e3 * result.probe.small_s, result.probe.bits_per_s / 1e6
                print(
                    f"all-reduce of 4 bytes: {small:.1f} ms; of {PROBE_BYTES >> 20} MiB: {rate:.1f} Mbit/s\n{line_of()}"
                )
            results.append(result)
            print(line_of(result), flush=True)
    return results


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", action="append", default=[], help="as in a config; may be given again and again")
    parser.add_argument("--preset", choices=list(PRESETS), help="rows of the table of syncs; quick if nothing is named")
    parser.add_argument("--link", type=_network, default="100mbit/25ms", help="rate, and delay one way")
    parser.add_argument("--back", type=_network, help="what all but the first replica send by; as --link")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that get lost")
    parser.add_argument("--jitter", type=float, default=0.0, help="most milliseconds added to a delay")
    parser.add_argument("--queue", type=float, default=400.0, help="most milliseconds that a packet waits to be sent")
    parser.add_argument("--mtu", type=int, default=9000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--warmup", type=int, default=100, help="how many of them are not timed, at least one")
    parser.add_argument("--compute-ms", type=float, default=30.0, help="least time that a step computes")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    asked = parser.parse_args()
    if asked.steps <= asked.warmup:
        parser.error(f"--steps {asked.steps}: expected more than --warmup {asked.warmup}, which are part of them")
    given = Conditions(
        link=asked.link,
        back=asked.back or asked.link,
        weather=Weather(loss=asked.loss, jitter_s=asked.jitter / 1e3, queue_s=asked.queue / 1e3),
        mtu=asked.mtu,
        replicas=asked.replicas,
        steps=asked.steps,
        warmup=max(1, asked.warmup),
        compute_s=asked.compute_ms / 1e3,
    )
    preset = asked.preset or (None if asked.sync else "quick")
    syncs = [ROWS[name] for name in PRESETS.get(preset, ())] + [yaml.safe_load(text) for text in asked.sync]
    try:
        results = compare(syncs, given)
    except Forbidden as error:
        sys.exit(
            f"NOT MEASURED: {error}. Run as root, in a container with --cap-add SYS_ADMIN --cap-add NET_ADMIN "
            "--device /dev/net/tun"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; no process and no network is left")
    except (ConfigError, PlanError) as error:
        sys.exit(str(error))
    if asked.json:
        print(json.dumps([asdict(result) for result in results]))


def _network(text: str) -> Network:
    try:
        return Network.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # numpy would start threads, and ranks are forked
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OPENBLAS_NUM_THREADS": "1"})  # noqa: S606
    main()
