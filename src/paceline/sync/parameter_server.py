"""A parameter server (Dean et al. 2012; Li et al. 2014): servers hold the parameters and take the steps.

Each replica is a worker: it pushes the gradient of its own targets and pulls the weights that come of it. When these
are ready is the ``mode`` (``sync/server/coordinator.py``). Servers hold the optimizer's state and step with the run's
own optimizer. A replica's copy of that state is filled when a checkpoint is due, so a checkpoint is the same as with
any other sync. A single replica needs no server, and has none.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from paceline.comm.replica import Finish, Remote, Replica, Shard
from paceline.config import Count, Fraction, Natural, Options, Positive, strategy_name
from paceline.errors import PlanError
from paceline.plan.wire import all_reduce_bytes
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext, SyncState, check_equal_start
from paceline.sync.served import Servers, as_remote, owned, whole_shapes
from paceline.sync.server import messages as m
from paceline.sync.server.channel import Channel
from paceline.sync.server.coordinator import Rules
from paceline.sync.server.store import Delay


class ParameterServer(Options):
    """Servers hold the parameters; replicas push gradients and pull weights."""

    mode: Literal["sync", "async", "stale"] = "sync"
    """``sync``: all replicas' gradients make a step, as with all-reduce. ``async``: each replica's gradient is a step,
    at once. ``stale``: a replica may run ahead of the slowest by ``staleness`` steps."""
    staleness: Natural = 1
    """Of ``stale``; 0 is ``sync``."""
    servers: Count = 2
    """Processes among which parameters are shared out."""
    compensation: Literal["none", "constant", "adaptive"] = "none"
    """Of ``async``: correct a late gradient for what has changed since (DC-ASGD)."""
    compensation_strength: Positive | None = None
    """lambda of ``constant``, by default 0.04, or lambda_0 of ``adaptive``, by default 2."""
    compensation_decay: Fraction = 0.95
    """Of the average of squares of ``adaptive``."""
    scale_rate: bool = False
    """Of ``async``: divide a step by its staleness + 1."""
    durability: Literal["none", "process", "host"] = "process"
    """What a push outlives: nothing; the death of a server, which is started again; or also that of the machine (waits
    for the disk). In processes of their own only."""
    timeout_s: Positive = 600.0
    """How long a server, or the slowest replica, is waited for."""

    @model_validator(mode="after")
    def _belongs(self) -> "ParameterServer":
        if self.mode != "async" and (self.compensation != "none" or self.scale_rate):
            raise ValueError(f"compensation and scale_rate are for mode=async, got mode={self.mode}")
        return self

    is_served: ClassVar[bool] = True
    """It wants server processes."""

    @property
    def keeps_equal(self) -> bool:
        """In lock step only."""
        return self.is_lock_step

    @property
    def is_lock_step(self) -> bool:
        """Whether replicas wait for each other in every step."""
        return self.mode == "sync" or (self.mode == "stale" and self.staleness == 0)

    @property
    def clips(self) -> bool:
        """Whether the norm that is clipped is that of a sum, which servers have."""
        return self.mode != "async"

    def check(self, config: Any) -> None:
        """Raise ``PlanError`` for what servers cannot do."""
        optimizer = config.optimizer
        name = f"optimizer={strategy_name(optimizer)}"
        reason = None
        if len(config.syncs) > 1:
            raise PlanError(
                "sync: parameter_server as one level of several is not built: the replicas of a group would push the "
                "same gradient. Use it alone"
            )
        if config.all_replicas == 1:
            return
        if optimizer.sees != "values":
            reason = f"{name} looks at more than single values with their gradient, and a server has pieces of tensors"
        elif optimizer.averages:
            reason = f"{name} averages weights between steps, which servers take"
        if reason is not None:
            raise PlanError(f"sync=parameter_server: {reason}. Use adamw, adabelief, adagrad, lion, ftrl or sgd")
        if config.precision in {"fp16", "bf16_pure"}:
            raise PlanError(
                f"sync=parameter_server with precision={config.precision} is not built: servers step in fp32, without "
                "a loss scale. Use precision=bf16 or fp32"
            )
        if config.reduction != "fp32":
            raise PlanError(f"sync=parameter_server sums in fp32, not in reduction={config.reduction}. Use fp32")
        if config.perturb is not None:
            raise PlanError("perturb would move weights that are the servers'. Leave it out, or use sync=all_reduce")
        asked = {**config.regularisation.model_dump()}
        asked |= {"clip_value": config.train.clip_value, "clip_block_norm": config.train.clip_block_norm}
        for key in (key for key, value in asked.items() if value):
            raise PlanError(
                f"{key}={asked[key]} with sync=parameter_server is not built: the step is the servers'. Use "
                "train.clip_norm, optimizer.weight_decay, or sync=all_reduce"
            )

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """In every step the gradients and, in lock step, a vote, two sums and a request to stop."""
        if members == 1:
            return 0
        gradients = value_bytes * sum(math.prod(shape) for shape in shapes.values())
        told = all_reduce_bytes(3 * COUNT_BYTES, members) + all_reduce_bytes(COUNT_BYTES, members)
        return steps * (gradients + told * self.is_lock_step)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """What is pushed and what is pulled, once each."""
        return 2 * value_bytes * sum(math.prod(shape) for shape in shapes.values())

    def build(self, context: SyncContext) -> "ParameterServerSync":
        """The strategy at work."""
        return ParameterServerSync(self, context)


class ParameterServerSync:
    """One rank of a worker."""

    def __init__(self, options: ParameterServer, context: SyncContext) -> None:
        self._options, self._context, self._link = options, context, context.link
        self._servers: Servers
        self._channel: Channel | None = None
        self._life = self._number = 0
        self._is_open = False
        self._step = self._count = 0
        self._granted: m.Granted
        self._stop: int | None = None
        self._asked = False

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and find the servers: those that were started, or threads of the first."""
        check_equal_start(self._link, replica)
        if self._link.size == 1:
            return
        self._device = replica.shards[0].local.device if replica.shards else torch.device("cpu")
        self._servers = Servers(self._context, as_remote(replica), self._options.servers, self._options.timeout_s)

    def begin(self, step: int, replica: Replica, count: int) -> int:
        """This replica's own targets: servers weigh its gradient by them."""
        if self._link.size > 1 and not self._is_open:
            self._open(as_remote(replica), step)
        self._step, self._count = step, count
        return count

    def total(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """In lock step the sum over the replicas; else a replica's own, and all stop when they next meet."""
        if self._link.size == 1:
            return values, stop
        if self._options.is_lock_step:
            total = torch.cat([values, values.new_tensor([float(stop)])]).to(self._device)
            self._link.all_reduce(total).wait()
            return total[:-1], bool(total[-1] > 0)
        self._asked = stop
        return values, self._stop == self._step

    def reduce(self, replica: Replica) -> None:
        """Servers have the sum."""

    def update(self, replica: Replica) -> Finish:
        """Let servers take the step, and go on from what comes of it."""
        if self._link.size == 1:
            return replica.finish(vote=lambda wish: wish)
        remote = as_remote(replica)
        finish = remote.finish(vote=self._vote, step=lambda: self._exchange(remote))
        if finish.stepped and self._options.clips:
            return Finish(stepped=True, gradient_norm=self._granted.norm)
        return finish

    def is_agreed(self, step: int) -> bool:
        """In lock step always; else where all meet."""
        return self._options.is_lock_step or self._link.size == 1 or self._meets(step)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Where replicas meet they hold the same."""
        return {shard.name: shard.local for shard in replica.shards}

    def state(self) -> Mapping[str, SyncState]:
        """All that outlives a step is the optimizer's, and saved as such."""
        return {}

    def restored(self) -> None:
        """Weights or the optimizer's state were set from outside: servers begin anew with these."""
        self._is_open = False

    def gather(self, replica: Replica) -> None:
        """Before a save: fill the replica's optimizer with what servers keep."""
        if self._link.size > 1 and self._is_open and not self._meets(self._step):
            self._fetch_state(as_remote(replica))

    def words(self) -> str | None:
        """How stale pushes were, of all replicas; None where none can be."""
        if self._channel is None or self._options.is_lock_step:
            return None
        told = self._channel.told()[0]["histogram"]
        counts = ", ".join(f"{staleness}: {count:,}" for staleness, count in sorted(told.items()))
        return f"pushes by their staleness in versions: {counts}"

    def _vote(self, wish: bool) -> bool:
        """In lock step none steps if one must not; who runs at its own pace decides alone."""
        if not self._options.is_lock_step:
            return wish
        unwilling = torch.tensor([float(not wish)], dtype=torch.float64, device=self._device)
        self._link.all_reduce(unwilling).wait()
        return bool(unwilling == 0)

    @torch.no_grad()
    def _exchange(self, replica: Remote) -> None:
        assert self._channel is not None
        gradients = {shard.name: g for shard in owned(replica) if (g := shard.gradient) is not None}
        self._number += 1
        self._servers.stage(self._channel, self._number, gradients)
        replica.sum_of(torch.zeros(1))  # all ranks have staged
        clock, rate = self._step - 1, replica.rate / replica.learns_by.lr
        if replica.is_first:
            client = self._channel.client
            self._servers.caller.run(
                client.commit(self._number, clock=clock, targets=self._count, rate=rate, stop=self._asked)
            )
        self._go_on(replica, self._step)
        if self._meets(self._step):
            self._fetch_state(replica)
            self._servers.barrier(replica)

    def _go_on(self, replica: Remote, clock: int) -> None:
        """Wait for the weights of a clock; all ranks of the replica read one version."""
        assert self._channel is not None
        told = torch.zeros(7, dtype=torch.float64)
        if replica.is_first:
            granted = self._servers.caller.run(self._channel.client.turn(clock, meet=self._meets(clock)))
            told = torch.tensor([-1.0 if value is None else float(value) for value in granted[:7]], dtype=torch.float64)
        clock, version, entry, floor, staleness, norm, stop = replica.sum_of(told).tolist()
        self._stop = None if stop < 0 else int(stop)
        self._granted = m.Granted(int(clock), int(version), int(entry), int(floor), int(staleness), norm, self._stop)
        self._channel.pull(self._granted, {shard.name: shard.local for shard in replica.shards})

    def _meets(self, step: int) -> bool:
        """Whether all replicas wait for each other after a step, whatever the mode."""
        return step in {self._context.steps, self._stop} or self._context.meets(step)

    # Servers, and what they start from.

    def _open(self, replica: Remote, step: int) -> None:
        """Give servers the weights and the optimizer's state that replica 0 has, and join."""
        options, context, learns_by = self._options, self._context, replica.learns_by
        staleness = options.staleness if options.mode == "stale" else 0
        rules = Rules(
            workers=self._link.size,
            shards=options.servers,
            mode=options.mode,
            staleness=staleness,
            scaled=options.scale_rate,
            clip_norm=context.clip_norm,
            first_clock=step - 1,
        )
        self._life += 1
        self._number = 0
        self._stop = None
        if self._channel is not None:
            self._channel.close()
        self._channel = self._servers.channel(replica, rules, whole_shapes(replica, context))
        strength = options.compensation_strength or {"constant": 0.04}.get(options.compensation, 2.0)
        delay = Delay(kind=options.compensation, strength=strength, decay=options.compensation_decay)
        if self._link.index == 0 and replica.is_first:
            self._channel.set_up(self._life, optimizer=_plain(learns_by), delay=delay)
        self._servers.barrier(replica)
        if self._link.index == 0:
            _fill(self._channel, replica, owned(replica))
        self._servers.barrier(replica)
        self._channel.join(self._life)
        self._is_open = True
        self._go_on(replica, step - 1)

    @torch.no_grad()
    def _fetch_state(self, replica: Remote) -> None:
        """What servers keep of this rank's parameters, into the replica's own optimizer."""
        assert self._channel is not None
        kept: dict[str, dict[str, Any]] = {}
        for told in self._channel.told():
            kept |= told["kept"]
        for shard in replica.shards:
            for key, number in kept.get(shard.name, {}).items():
                if number is not None:
                    value, dtype = number
                    replica.keep(shard.name, key, torch.tensor(value, dtype=getattr(torch, dtype)))
        for key in sorted({key for values in kept.values() for key, number in values.items() if number is None}):
            having = [shard for shard in replica.shards if key in kept.get(shard.name, {})]
            into = {shard.name: torch.zeros_like(shard.local) for shard in having}
            self._channel.pull(self._granted, into, key)
            for name, value in into.items():
                replica.keep(name, key, value)


def _plain(options: Options) -> dict[str, Any]:
    return {"name": strategy_name(options), **options.model_dump(mode="json")}


def _fill(channel: Channel, replica: Remote, shards: list[Shard]) -> None:
    channel.fill(None, {shard.name: shard.local for shard in shards})
    kept = {shard.name: replica.kept(shard.name) for shard in shards}
    tensors = {
        key
        for shard in shards
        for key, value in kept[shard.name].items()
        if value.shape == shard.local.shape and value.ndim
    }
    for key in sorted(tensors):
        channel.fill(key, {name: values[key] for name, values in kept.items() if key in values})
    channel.ready(
        {
            name: {
                key: (float(value), str(value.dtype).removeprefix("torch."))
                for key, value in values.items()
                if key not in tensors
            }
            for name, values in kept.items()
            if values
        }
    )
