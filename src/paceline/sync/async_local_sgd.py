"""Asynchronous local SGD (Liu et al. 2024, arXiv 2401.09135): replicas learn alone, and nobody waits for others.

    take      a lease: the next shares of the run, and the parameters of now, theta
    learn     local steps with them, by the run's own optimizer, to theta'
    push      Delta = theta - theta'; servers go along it at once, with delayed Nesterov momentum

A step of the run has as many shares as there are replicas, each a replica's part of the batch, and each is learned from
exactly once, by whichever replica comes to it (``sync/server/local.py``). So the run has the tokens of any other, and
the rate of a local step is that of the step of its share. With ``dynamic_steps`` a lease is as long as the replica is
quick (the paper's dynamic local updates). Replicas meet where weights are measured or saved; there all is done up to a
step, and all hold the same weights.

A single replica needs no server: it is DiLoCo with this outer rule.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from paceline.comm.replica import Replica
from paceline.config import Count, Fraction, Options, Positive, SyncOptions, strategy_name
from paceline.errors import PlanError
from paceline.plan.network import Network
from paceline.plan.wire import MESSAGE_DELAYS
from paceline.sync.alone import exchanges
from paceline.sync.async_replica import BINS, AsyncLocalSync, Kept
from paceline.sync.base import Load, Shapes, Sync, SyncContext, SyncState
from paceline.sync.periodic import PeriodicSync
from paceline.sync.reducers.mean import Mean
from paceline.sync.server.delayed_nesterov import DelayedNesterov, OuterRule, Window

_ANSWERS = 4
"""For which a replica waits in an exchange: of stage, commit, turn and pull."""


class DelayedOuter(Options):
    """The outer optimizer: SGD on pseudo-gradients, with momentum in every so manieth of them."""

    lr: Positive = 0.7
    """The outer rate; constant."""
    momentum: Fraction = 0.9
    """Share of the outer momentum that is kept."""
    delay: Count | None = None
    """Pushes of all replicas from one step of momentum to the next; by default as many as there are replicas."""


class AsyncLocalSGD(SyncOptions):
    """Learn alone for many steps, then push what was learned to servers, and go on from what they have."""

    every: Count = 50
    """Local steps from one push of a replica to its next; with ``dynamic_steps`` those of the quickest."""
    dynamic_steps: bool = True
    """Slower replicas take fewer local steps, in proportion to their measured speed."""
    least: Count = 5
    """With ``dynamic_steps``: but so many at least."""
    outer: DelayedOuter = DelayedOuter()
    """The outer optimizer."""
    order: Literal["arrival", "replicas"] = "arrival"
    """In which order pushes are applied: as they come, or in that of the replicas, where a second run gives the same
    bits, and all go at the pace of the slowest."""
    servers: Count = 2
    """Processes among which parameters are shared out."""
    durability: Literal["none", "process", "host"] = "process"
    """What a push outlives: nothing; the death of a server, which is started again; or also that of the machine (waits
    for the disk). In processes of their own only."""
    timeout_s: Positive = 600.0
    """How long a server, or the slowest replica, is waited for."""

    @model_validator(mode="after")
    def _belongs(self) -> "AsyncLocalSGD":
        if self.order == "replicas" and self.dynamic_steps:
            raise ValueError(
                "order=replicas is for runs that give the same bits again, and dynamic_steps=true goes by times; set "
                "dynamic_steps=false"
            )
        return self

    is_served: ClassVar[bool] = True
    claims: ClassVar[bool] = True
    """Its replicas take what is next, so that steps end where all meet."""

    @property
    def sends_less(self) -> bool:
        """Whether ``wire_bytes`` is only the most that can be."""
        return self.dynamic_steps

    @property
    def repeats(self) -> bool:
        """Whether a second run gives the same."""
        return self.order == "replicas"

    def check(self, config: Any) -> None:
        """Raise ``PlanError`` for what goes by steps that all replicas take."""
        if len(config.syncs) > 1:
            raise PlanError(
                "sync: async_local_sgd as one level of several is not built: the replicas of a group would take "
                "different shares. Use it alone"
            )
        if config.all_replicas == 1:
            return
        if config.precision == "bf16_pure":
            raise PlanError(
                "sync=async_local_sgd with precision=bf16_pure is not built: servers add up in the dtype of the "
                "weights, and would lose pushes in rounding. Use precision=bf16"
            )
        if config.average.keeps or config.optimizer.averages:
            what = f"average={strategy_name(config.average)}"
            if config.optimizer.averages:
                what = f"optimizer={strategy_name(config.optimizer)}"
            raise PlanError(
                f"sync=async_local_sgd with {what} is not built: replicas take different numbers of steps, over which "
                "they would average. Use sync=diloco, or leave averages out"
            )

    def pushes(self, members: int, steps: int) -> int:
        """Of a replica: how many there are on average, or with ``dynamic_steps`` at most, if it does all the work."""
        if self.dynamic_steps:
            return exchanges(min(self.least, self.every), steps * members)
        return exchanges(self.every, steps)

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """The pseudo-gradients; steps at which replicas meet before the end are taken to be multiples of ``every``."""
        return self.pushes(members, steps) * 4 * _numel(shapes) if members > 1 else 0

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """The answers of servers."""
        return _ANSWERS * MESSAGE_DELAYS * self.pushes(members, steps) if members > 1 else 0

    def exchange_s(self, network: Network, load: Load) -> float:
        """See ``Timed``: servers stand beside one replica, over whose link others push and pull at the same time.

        Of replicas that are equally quick.
        """
        others = load.members - 1
        if others == 0:
            return 0.0
        pushes = exchanges(self.every, load.steps)
        passing = max(2, others) * 4 * _numel(load.shapes)
        return network.seconds(pushes * passing, pushes * _ANSWERS * MESSAGE_DELAYS)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The parameters a lease began from, what servers keep of each, and what is pushed and pulled, once each."""
        return (4 + (self.outer.momentum > 0)) * 4 * _numel(shapes) + 8 * (BINS + 16)

    def build(self, context: SyncContext) -> Sync:
        """The strategy at work."""
        outer = self.outer
        rule = DelayedNesterov(lr=outer.lr, momentum=outer.momentum, delay=outer.delay or context.link.size)
        if context.link.size == 1:
            return _Single(context, self.every, rule)
        return AsyncLocalSync(self, rule, context)


class _Single(PeriodicSync):
    """A replica without others."""

    def __init__(self, context: SyncContext, every: int, rule: DelayedNesterov) -> None:
        self._rule, self._kept = OuterRule(rule), Kept()
        reducer = Mean().build(context)
        super().__init__(context, every=every, reducer=reducer, is_exact=True, outer=_Stateless(self._rule))

    def state(self) -> Mapping[str, SyncState]:
        """As of several replicas, of which another number may go on."""
        return {**super().state(), **self._kept.state(self._rule.buffer, self._rule.momentum)}

    def _exchange(self, replica: Replica, targets: float) -> None:
        self._rule.window = Window.of(self._rule.window.delay, self._kept.numbers.tolist())
        self._rule.take(targets or 1.0, (targets or 1.0) / float(self._window[2]) * self._every)
        super()._exchange(replica, targets)
        self._kept.numbers.copy_(torch.tensor(self._rule.window.numbers, dtype=torch.float64))


class _Stateless:
    """An outer rule whose state somebody else gives."""

    def __init__(self, rule: OuterRule) -> None:
        self.start, self.step = rule.start, rule.step

    def state(self) -> Mapping[str, SyncState]:
        return {}


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
