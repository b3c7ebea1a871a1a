"""The ranks of a run, and its parameter servers, as actors of a Ray cluster: Ray places them and starts them again.

Tensors do not go through Ray: ranks and servers find each other by addresses, as they do under the other launchers. All
nodes see ``train.output`` and the data, as with torchrun on several machines.

    ranks     a bundle of one placement group each, packed. One that dies is started again by Ray, and so that all hold
              the same, the others too: the run goes on from its newest checkpoint
    servers   in the bundles of the first ranks. One that dies is started again by Ray on its node, listens where it
              did, and reads its log; the ranks ask it again, and nothing shows
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paceline.comm.ranks import Coordinates
from paceline.comm.world import Rendezvous
from paceline.errors import LinkError, MissingExtraError, PacelineError, WorkerError
from paceline.launch.local import Rank, signals
from paceline.sync.server.keep import address
from paceline.sync.server.serve import Address, Durability, Server
from paceline.train.policy import StopRequest
from paceline.workers.process import Message, told_error

Main = Callable[[Coordinates, Rendezvous, Any, StopRequest], None]
"""A rank: it is given its place, where ranks meet, what takes its messages, and what asks it to stop."""
_MOST_STARTS = 3
"""Of all ranks, one after the other, without a step between."""
_POLL_S = 0.5
_START_S = 300.0
_GRACE_S = 5.0
_OF_OTHERS = {"LinkError", "NonFiniteElsewhere"}
"""Errors of a rank whose cause is another one."""


def check() -> None:
    """Raise ``MissingExtraError`` without Ray."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--on ray needs the ray package: pip install 'paceline[ray]'")


class RayRun:
    """As ``LocalRun``, on the cluster that ``RAY_ADDRESS`` names, or on one that is started here.

    ``servers``: how many are beside the ranks, and where they keep their logs.
    """

    def __init__(
        self,
        main: Main,
        coordinates: Sequence[Coordinates],
        *,
        port: int,
        logs: Path,
        servers: tuple[int, Durability] | None = None,
    ) -> None:
        check()
        import ray

        self._ray, self._main, self._coordinates, self._logs = ray, main, list(coordinates), logs
        self._owns = not ray.is_initialized()
        if self._owns:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="paceline")
        self._actors: list[Any] = []
        self._servers: list[Any] = []
        self._group: Any = None
        self._ranks: list[Rank] = []
        self._pending: list[Any] = []
        self._is_stopping = self._is_abandoned = False
        try:
            self._host = ray.util.get_node_ip_address()
            self._group = self._placed()
            self._mail = self._actor(_Mail, None, num_cpus=0).remote()
            self._addresses = self._start_servers(servers)
            self._rendezvous = Rendezvous(host=self._host, port=port, loopback=False)
            self._store = self._rendezvous.host_store()
            self._attempt = 0
            self._start()
        except BaseException:
            self.kill()
            raise

    @property
    def ranks(self) -> list[Rank]:
        """As they were started last."""
        return self._ranks

    @property
    def servers(self) -> list[int]:
        """Their pids, as they are now; those that are just being started again are left out."""
        asked = [server.who.remote() for server in self._servers]
        done, _ = self._ray.wait(asked, num_returns=len(asked), timeout=_POLL_S) if asked else ([], [])
        pids = []
        for one in done:
            with suppress(self._ray.exceptions.RayError):
                pids.append(self._ray.get(one))
        return pids

    def messages(self) -> Iterator[tuple[int, Message]]:
        """What the ranks send, as (global rank, message), until all have finished; they may have to begin anew."""
        starts = 1
        with signals(self.stop, self.abandon):
            while self._pending:
                for rank, message in self._received():
                    starts = 0 if message["kind"] == "step" else starts
                    yield rank, message
                if self._is_abandoned:
                    raise KeyboardInterrupt
                died, problems = self._ended()
                if died is not None:
                    starts += 1
                    if starts > _MOST_STARTS or self._is_stopping:
                        raise WorkerError(f"a rank died: {died}")
                    yield from self._received()
                    yield 0, {"kind": "again", "text": "a rank died: all begin anew from the newest checkpoint"}
                    self._start()
                elif problems:
                    first = min(problems, key=lambda problem: problem["type"] in _OF_OTHERS)
                    raise told_error(first, self._logs)
        yield from self._received()
        self.kill()

    def stop(self) -> None:
        """Ask every rank to finish its step, save and exit."""
        self._is_stopping = True
        for actor in self._actors:
            actor.stop.remote()

    def kill(self) -> None:
        """End everything at once, and the cluster if it was started here."""
        for actor in [*self._actors, *self._servers]:
            with suppress(Exception):
                self._ray.kill(actor, no_restart=True)
        self._actors, self._servers = [], []
        if self._group is not None:
            with suppress(Exception):
                self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._owns:
            self._ray.shutdown()

    def abandon(self) -> None:
        """End everything at once; ``messages`` raises ``KeyboardInterrupt``."""
        self._is_abandoned = True
        self.kill()

    def _ended(self) -> tuple[str | None, list[Message]]:
        """How a rank died, if one did, and what ranks said that could not go on.

        The loss of a peer is often noticed before it is known that it died: a rank that speaks of that is given time.
        """
        problems: list[Message] = []
        timeout_s = 0.0
        while True:
            done, self._pending = self._ray.wait(self._pending, num_returns=len(self._pending), timeout=timeout_s)
            for one in done:
                try:
                    told = self._ray.get(one)
                except self._ray.exceptions.RayError as error:
                    return " ".join(str(error).split())[:300], problems
                problems += [told["problem"]] if "problem" in told else []
            is_cause_unknown = problems and all(problem["type"] in _OF_OTHERS for problem in problems)
            if timeout_s or not (is_cause_unknown and self._pending):
                return None, problems
            timeout_s = _GRACE_S

    # Starting.

    def _placed(self) -> Any:
        """A bundle for each rank: a core, and a GPU where the cluster has any."""
        ray = self._ray
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if ray.cluster_resources().get("GPU") else {})}
        self._bundle = bundle
        group = ray.util.placement_group([dict(bundle) for _ in self._coordinates], strategy="PACK")
        ready, _ = ray.wait([group.ready()], timeout=_START_S)
        if not ready:
            raise WorkerError(
                f"the Ray cluster has no room for {len(self._coordinates)} ranks of {bundle} within {_START_S:g} s; it "
                f"has {ray.cluster_resources().get('CPU', 0):g} CPUs in all. Add nodes, or use fewer ranks"
            )
        return group

    def _actor(self, kind: type, bundle: int | None, **options: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            )
        return self._ray.remote(kind).options(**options)

    def _start_servers(self, wanted: tuple[int, Durability] | None) -> list[Address]:
        """Each knows where the first one is, which has the coordinator."""
        if wanted is None:
            return []
        count, durability = wanted
        addresses: list[Address] = []
        for number in range(count):
            kind = self._actor(
                _ServerActor,
                number % len(self._coordinates),
                num_cpus=0,
                max_concurrency=2,
                # Without a log it would come back with nothing.
                max_restarts=0 if durability.folder is None else -1,
            )
            own = (
                durability if durability.folder is None else replace(durability, folder=durability.folder / str(number))
            )
            server = kind.remote(number, own, addresses[0] if addresses else None, os.getcwd())
            self._servers.append(server)
            addresses.append(self._ray.get(server.at.remote(), timeout=_START_S))
        return addresses

    def _start(self) -> None:
        """All ranks, as a new attempt; those of the last one are ended, and Ray starts them again."""
        ray = self._ray
        self._attempt += 1
        if not self._actors:
            self._actors = [
                self._actor(
                    _RankActor,
                    rank,
                    num_cpus=1,
                    num_gpus=self._bundle.get("GPU", 0),
                    max_restarts=-1,
                    max_concurrency=2,
                ).remote(os.getcwd())
                for rank in range(len(self._coordinates))
            ]
        else:
            for actor in self._actors:
                ray.kill(actor, no_restart=False)
        told = self._all_there({rank.pid for rank in self._ranks})
        hosts = [host for host, _ in told]
        places = []
        for rank, own in enumerate(self._coordinates):
            beside = [other for other in range(len(hosts)) if hosts[other] == hosts[rank]]
            places.append(replace(own, local_rank=beside.index(rank), local_ranks=len(beside)))
        is_one_host = set(hosts) == {self._host}
        meeting = replace(
            self._rendezvous,
            host="127.0.0.1" if is_one_host else self._host,
            port=self._store.port,
            loopback=is_one_host,
            attempt=str(self._attempt),
            servers=tuple(self._addresses),
        )
        self._ranks = [
            Rank(coordinates=place, pid=pid, log=self._logs) for place, (_, pid) in zip(places, told, strict=True)
        ]
        self._pending = [
            actor.run.remote(self._main, place, meeting, self._mail)
            for actor, place in zip(self._actors, places, strict=True)
        ]

    def _all_there(self, ended: set[int]) -> list[tuple[str, int]]:
        """Host and pid of every rank, once all have started and none is one of the processes that were ended."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                told: list[tuple[str, int]] = self._ray.get(
                    [actor.who.remote() for actor in self._actors], timeout=_START_S
                )
                if ended.isdisjoint(pid for _, pid in told):
                    return told
            except self._ray.exceptions.RayActorError as error:  # it is being started again
                if time.monotonic() > deadline:
                    raise WorkerError(f"Ray did not start the ranks: {' '.join(str(error).split())[:300]}") from None
            time.sleep(_POLL_S / 10)

    def _received(self) -> list[tuple[int, Message]]:
        messages: list[tuple[int, Message]] = self._ray.get(self._mail.take.remote(_POLL_S))
        return messages


class _Mail:
    """Messages of the ranks on their way to who started them."""

    def __init__(self) -> None:
        import asyncio

        self._messages: list[tuple[int, Message]] = []
        self._some = asyncio.Event()

    async def put(self, rank: int, message: Message) -> None:
        """From a rank."""
        self._messages.append((rank, message))
        self._some.set()

    async def take(self, timeout_s: float) -> list[tuple[int, Message]]:
        """All that came, or nothing after a while."""
        import asyncio

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._some.wait(), timeout_s)
        self._some.clear()
        messages, self._messages = self._messages, []
        return messages


class _Line:
    """What a rank sends, by Ray."""

    def __init__(self, mail: Any, rank: int) -> None:
        self._mail, self._rank = mail, rank

    def send(self, kind: str, **content: Any) -> None:
        """Send a message."""
        self._mail.put.remote(self._rank, {"kind": kind, **content})


class _RankActor:
    """One rank. Its main thread is Ray's; so it is asked to stop by a call, not by a signal."""

    def __init__(self, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)  # paths in the config are relative to where the run was started
        self._stop = StopRequest()

    def who(self) -> tuple[str, int]:
        """Host and pid."""
        import ray

        return ray.util.get_node_ip_address(), os.getpid()

    def run(self, main: Main, coordinates: Coordinates, rendezvous: Rendezvous, mail: Any) -> dict[str, Any]:
        """Train; an error that is for the user is told, and any other kills the actor as it would a process."""
        try:
            main(coordinates, rendezvous, _Line(mail, coordinates.global_rank), self._stop)
        except PacelineError as error:
            return {
                "problem": {"type": type(error).__name__, "message": str(error), "expected": True, "traceback": None}
            }
        return {}

    def stop(self) -> None:
        """Ask it to stop."""
        self._stop.asked = True


class _ServerActor:
    """One parameter server. It listens where its first life did, which it keeps beside its log."""

    def __init__(self, number: int, durability: Durability, coordinator: Address | None, folder: str) -> None:
        import torch

        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(1)
        listening = _listen(durability.folder)
        self._at = address(listening)
        self._number = number
        server = Server(number, listening, coordinator or self._at, durability)
        threading.Thread(target=self._serve, args=(server,), daemon=True).start()

    def at(self) -> Address:
        """Where it listens."""
        return self._at

    def who(self) -> int:
        """Its pid."""
        return os.getpid()

    def _serve(self, server: Server) -> None:
        try:
            server.run()
        finally:
            os._exit(1)  # Ray starts it again


def _listen(folder: Path | None) -> socket.socket:
    """A socket at the address of before, if there was one."""
    import ray

    if folder is None:
        return socket.create_server((ray.util.get_node_ip_address(), 0), backlog=128)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "address"
    host, port = kept.read_text().split() if kept.exists() else (ray.util.get_node_ip_address(), "0")
    try:
        listening = socket.create_server((host, int(port)), backlog=128)
    except OSError as error:
        raise LinkError(f"a parameter server cannot listen at {host}:{port} again: {error.strerror}") from None
    kept.write_text("{} {}".format(*address(listening)))
    return listening
