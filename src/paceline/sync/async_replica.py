"""A replica of asynchronous local SGD among several: it takes leases, learns, pushes and pulls."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paceline.comm.replica import Finish, Remote, Replica
from paceline.errors import TrainError
from paceline.plan.wire import all_reduce_bytes
from paceline.sync.alone import wide
from paceline.sync.base import NOTHING, Share, SyncContext, SyncState, check_equal_start
from paceline.sync.served import Servers, as_remote, owned
from paceline.sync.server import messages as m
from paceline.sync.server.channel import Channel
from paceline.sync.server.contents import full_shapes
from paceline.sync.server.delayed_nesterov import DelayedNesterov, Window
from paceline.sync.server.rules import LocalRules, Rules
from paceline.sync.server.store import Delay

if TYPE_CHECKING:
    from paceline.sync.async_local_sgd import AsyncLocalSGD

BINS = 64
"""Of the histogram that a checkpoint keeps; the last one holds all that are staler."""


class Kept:
    """The numbers that outlive a run's end: of all replicas alike, but for the last two."""

    def __init__(self) -> None:
        self.numbers = torch.zeros(3, dtype=torch.float64)
        """Of the window: pushes, weight, usual targets."""
        self.histogram = torch.zeros(BINS, dtype=torch.float64)
        self.speed = torch.zeros(1, dtype=torch.float64)
        self.steps = torch.zeros(1, dtype=torch.float64)

    def state(self, buffer: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, SyncState]:
        """With what servers keep of each parameter."""
        own = {"buffer": buffer, "outer_momentum": momentum}
        return {
            "outer_window": SyncState(self.numbers),
            "staleness": SyncState(self.histogram),
            "speed": SyncState(self.speed, rule="mean"),
            "local_steps": SyncState(self.steps, rule="fresh"),
            **{f"{name}/{what}": SyncState(t, like=name) for what, each in own.items() for name, t in each.items()},
        }


class AsyncLocalSync:
    """One rank of a replica among several."""

    pace = 1.0
    """The speed of all replicas, in that of this one."""

    def __init__(self, options: "AsyncLocalSGD", rule: DelayedNesterov, context: SyncContext) -> None:
        self._options, self._rule, self._context, self._link = options, rule, context, context.link
        self._servers: Servers
        self._channel: Channel | None = None
        self._is_open = False
        self._life = self._number = self._clock = 0
        self.at = 0
        """Steps of the run that are done by all."""
        self._granted: m.Granted
        self._taken = 0  # in the lease
        self._began = 0.0
        self._count = self._learned = 0
        self._asked = False
        self._kept = Kept()
        self._window = torch.zeros(3, dtype=torch.float64)  # as single replicas have; empty where weights are saved
        self._base: dict[str, Tensor] = {}
        self._buffer: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, find the servers, and make places for what they keep."""
        check_equal_start(self._link, replica)
        self._servers = Servers(self._context, self._options.servers, self._options.timeout_s)
        self._servers.find(as_remote(replica))
        self._base = {shard.name: shard.local.clone() for shard in replica.shards}
        self._buffer = {name: torch.zeros_like(wide(t)) for name, t in self._base.items()}
        if self._rule.momentum > 0:
            self._momentum = {name: torch.zeros_like(wide(t)) for name, t in self._base.items()}

    def claim(self, done: int, replica: Replica) -> Sequence[Share]:
        """See ``Claiming``."""
        remote = as_remote(replica)
        if not self._is_open:
            self._open(remote, done)
        if self._granted.lease is None:
            until = next(s for s in range(done + 1, self._context.steps + 1) if self._meets(s))
            self._go_on(remote, until)
        lease = self._granted.lease
        assert lease is not None
        if self._taken == 0:
            self._began = time.perf_counter()
        shares = range(
            lease.first + self._taken * lease.stride, lease.first + lease.length * lease.stride, lease.stride
        )
        return [Share(share // self._link.size + 1, share % self._link.size) for share in shares]

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """This replica's own targets."""
        self._count = count
        return count

    def reduce(self, replica: Replica, values: Tensor | None = None, stop: bool = False) -> tuple[Tensor, bool]:
        """Gradients and values are this replica's own; all stop, if one was asked to, where they meet."""
        if values is None:
            return NOTHING, False
        self._asked = stop
        return values, False

    def update(self, replica: Replica) -> Finish:
        """Step; at the end of a lease push, and take the next one."""
        finish = replica.finish(vote=lambda wish: wish)
        if not (finish.stepped or finish.overflowed):
            return finish
        lease = self._granted.lease
        assert lease is not None, "a step without a share: claim one first"
        self._taken += 1
        self._learned += self._count * finish.stepped
        self._kept.steps += 1
        if self._taken < lease.length:
            return finish
        self._exchange(as_remote(replica))
        return replace(finish, stop=self._granted.lease is None and self._granted.stop is not None)

    def is_agreed(self, step: int) -> bool:
        """Where all have met."""
        return not self._is_open or (self._granted.lease is None and step == self.at)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Where replicas meet they hold the same."""
        return {shard.name: shard.local for shard in replica.shards}

    def state(self) -> Mapping[str, SyncState]:
        """What servers keep, and how far their numbers have come."""
        agreed = {f"{name}/agreed": SyncState(tensor, like=name) for name, tensor in self._base.items()}
        window = {"window": SyncState(self._window, rule="fresh")}
        return window | agreed | self._kept.state(self._buffer, self._momentum)

    # As a strategy whose servers hold what is otherwise the replica's.

    def restored(self) -> None:
        """Weights and what servers keep were set from outside: they begin anew with these."""
        self._is_open = False

    def gather(self, replica: Replica) -> None:
        """Before a save: what servers keep. Nobody pushes until all have gone on from where they met."""
        if not self._is_open:
            return
        assert self._channel is not None
        if self._granted.lease is not None:
            raise TrainError(
                "sync=async_local_sgd: replicas are at different places of the run now; save where all meet, which "
                "checkpoint.every says"
            )
        told = self._channel.told()
        kept = {name: keys for server in told for name, keys in server["kept"].items()}
        for key, into in (("buffer", self._buffer), ("momentum", self._momentum)):
            having = {name: tensor for name, tensor in into.items() if key in kept.get(name, {})}
            self._channel.pull(self._granted, having, key)
        self._take(told[0])

    def words(self) -> str | None:
        """How stale pushes were, and how many steps each replica took."""
        if self._channel is None:
            return None
        told = self._channel.told()[0]
        stale = ", ".join(f"{staleness}: {count:,}" for staleness, count in sorted(told["histogram"].items()))
        steps = ", ".join(f"{replica}: {count:,}" for replica, count in enumerate(told["steps"]))
        return f"pushes by their staleness in versions: {stale}; local steps by replica: {steps}"

    def _take(self, told: Mapping[str, Any]) -> None:
        kept, index = self._kept, self._link.index
        kept.numbers.copy_(torch.tensor(told["window"], dtype=torch.float64))
        kept.histogram.zero_()
        for staleness, count in told["histogram"].items():
            kept.histogram[min(staleness, BINS - 1)] += count
        kept.speed.fill_(told["speeds"][index])
        kept.steps.fill_(told["steps"][index])

    @torch.no_grad()
    def _exchange(self, replica: Remote) -> None:
        channel = self._channel
        assert channel is not None
        seconds = 0.0 if self._options.repeats else time.perf_counter() - self._began
        moved = {shard.name: self._base[shard.name] - shard.local for shard in owned(replica)}
        self._number += 1
        self._servers.stage(channel, self._number, moved)
        replica.sum_of(torch.zeros(1))  # all ranks have staged
        if replica.is_first:
            commit = channel.client.commit(
                self._number,
                clock=self._clock,
                targets=self._learned,
                rate=1.0,
                stop=self._asked,
                seconds=seconds,
            )
            self._servers.caller.run(commit)
        self._clock += 1
        self._learned = 0
        self._go_on(replica)
        channel.pull(self._granted, {shard.name: shard.local for shard in replica.shards})
        for shard in replica.shards:
            self._base[shard.name].copy_(shard.local)
        replica.refresh()

    def _go_on(self, replica: Remote, until: int | None = None) -> None:
        """Wait for a lease, or until all have met; all ranks of the replica hear the same."""
        assert self._channel is not None
        told = torch.zeros(12, dtype=torch.float64)
        if replica.is_first:
            granted = self._servers.caller.run(self._channel.client.lease(self._clock, until=until))
            own = [*granted[:7], *(granted.lease or (0, 0, 0)), granted.reached, granted.pace]
            told = torch.tensor([-1.0 if value is None else float(value) for value in own], dtype=torch.float64)
        clock, version, entry, floor, staleness, norm, stop, *lease, reached, pace = replica.sum_of(told).tolist()
        first, stride, length = map(int, lease)
        self._granted = m.Granted(
            int(clock),
            int(version),
            int(entry),
            int(floor),
            int(staleness),
            norm,
            None if stop < 0 else int(stop),
            m.Lease(first, stride, length) if length > 0 else None,
            int(reached),
            pace,
        )
        self._taken, self.pace = 0, pace
        if self._granted.lease is None:
            self.at = self._granted.reached

    def _meets(self, step: int) -> bool:
        return step == self._context.steps or self._context.meets(step)

    def _open(self, replica: Remote, done: int) -> None:
        """Give servers the weights and what they kept, as this replica has them, and join."""
        options, rule, servers, link = self._options, self._rule, self._servers, self._link
        own = torch.zeros(2, link.size, dtype=torch.float64)
        own[:, link.index] = torch.cat([self._kept.speed, self._kept.steps])
        link.all_reduce(own).wait()
        link.count(-all_reduce_bytes(own.nbytes, link.size))  # once, as what replicas compare at the start
        speeds, steps = own.tolist()
        local = LocalRules(
            every=options.every,
            dynamic=options.dynamic_steps,
            least=min(options.least, options.every),
            ordered=options.order == "replicas",
            delay=rule.delay,
            window=Window.of(rule.delay, self._kept.numbers.tolist()).numbers,
            speeds=tuple(speeds),
            steps=tuple(int(count) for count in steps),
            histogram=tuple((i, int(n)) for i, n in enumerate(self._kept.histogram.tolist()) if n > 0),
        )
        rules = Rules(workers=link.size, shards=options.servers, mode="local", first_clock=done, local=local)
        self._life += 1
        self._number, self._clock, self._taken, self.at = 0, done, 0, done
        if self._channel is not None:
            self._channel.close()
        self._channel = servers.channel(replica, rules, full_shapes(replica, self._context.shapes))
        if link.index == 0 and replica.is_first:
            self._channel.set_up(self._life, optimizer=rule.model_dump(mode="json"), delay=Delay())
        servers.barrier(replica)
        names = [shard.name for shard in owned(replica)]
        if link.index == 0:
            self._channel.fill(None, {shard.name: shard.local for shard in owned(replica)})
            for key, tensors in (("buffer", self._buffer), ("momentum", self._momentum)):
                if tensors:
                    self._channel.fill(key, {name: tensors[name] for name in names})
            self._channel.ready({})
        servers.barrier(replica)
        self._channel.join(self._life)
        self._is_open = True
        for shard in replica.shards:
            self._base[shard.name].copy_(shard.local)
        self._go_on(replica)
