"""A run of ``wan.py``: replicas as processes, each with a network of its own, and the router between them."""

import os
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import emulator
from emulator import INTERFACE, PORT, Forbidden, Side, Weather, address, sides
from meter import Meter, Probe, probe
from wan_cases import Conditions, config, formulas, name_of
from wan_table import Result

from paceline.comm.device import claim
from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.config import Config
from paceline.plan.layout import Grid
from paceline.train.assemble import assemble
from paceline.train.trainer import Loop
from paceline.workers.process import Child, Line, told_error


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
    least = 0.5 * (given.link.delay_s + given.back.delay_s)  # small tensors go from all to all at once
    most_bits_per_s = max(given.link.bits_per_s, given.back.bits_per_s)
    if probed.small_s < 0.98 * least or probed.bits_per_s > 1.02 * most_bits_per_s:
        raise Forbidden(
            f"the network does not delay as it was asked to: 4 bytes took {1e3 * probed.small_s:.1f} ms and not "
            f"{1e3 * least:.1f}, 4 MiB went at {probed.bits_per_s / 1e6:.0f} of {most_bits_per_s / 1e6:.0f} Mbit/s"
        )


def _result(
    run: Config,
    given: Conditions,
    probed: Probe,
    results: Sequence[Mapping[str, Any]],
    routed: Mapping[str, Any],
) -> Result:
    counted = given.steps - given.warmup
    steps = [result["steps"] for result in results]
    window = [rank[given.warmup : given.steps] for rank in steps]
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
        wire_bytes=(steps[0][given.steps - 1][2] - before) / counted,
        payload_bytes=payload,
        modelled_s=modelled,
        end_s=max(rank[-1][0] for rank in steps),
        loss=losses.pop(),
        probe=probed,
        dropped=routed["dropped"],
        late_s=routed["late_s"],
    )
