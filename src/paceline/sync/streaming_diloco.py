"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): DiLoCo by fragments, while the next steps are computed.

    fragment p         blocks p, p + P, p + 2P, ... of P fragments; what is in no block (embeddings, the last norm, the
                       head) is in the last one, which has the fewest blocks
    step  t            every (p + 1) / P, and every ``every`` steps from there: the fragment's parameters are sent
    step  t + delay    they are waited for; Delta, m and theta as DiLoCo's, of the fragment alone; then each replica
                       theta_i <- mixing theta_i + (1 - mixing) theta

Means are weighted by the targets learned from since the fragment was last sent. With a delay nobody waits when it is
sent, not even for the number of targets of all: tensors go times their own number, which goes beside them, and the sum
is divided when it is there. One fragment without delay and mixing is DiLoCo, bit for bit.

The outer step may be taken as soon as the sums are there, for it does not depend on what is learned meanwhile: so it is
before a checkpoint is written or the weights that stand for all are asked for, and what is left for step t + delay is
to mix. The last step of a run takes in what is on its way, and then exchanges everything, without delay or mixing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from paceline.comm.replica import Finish, Replica, Shard
from paceline.config import ChosenFrom, Count, Fraction, Natural, Positive, SyncOptions
from paceline.plan.network import Network
from paceline.plan.wire import all_reduce_bytes, all_reduce_delays
from paceline.registry import REDUCERS
from paceline.sync.alone import Alone, share_of, wide
from paceline.sync.base import COUNT_BYTES, Load, Shapes, SyncContext, SyncState
from paceline.sync.diloco import OuterOptions, OuterSGD
from paceline.sync.reducers.base import Wait
from paceline.sync.reducers.mean import Mean


class StreamingOuterOptions(OuterOptions):
    """The outer optimizer, SGD on pseudo-gradients of fragments."""

    lr: Positive = 0.4
    """The outer rate; constant."""


class StreamingDiLoCo(SyncOptions):
    """DiLoCo in which parts of the model are exchanged in turn, while steps are computed."""

    every: Count = 100
    """Inner steps from one exchange of a fragment to its next."""
    fragments: Count = 4
    """Into how many the blocks are dealt out; the paper has one for every three blocks."""
    delay: Natural = 1
    """Steps that are computed while a fragment is on its way."""
    mixing: Fraction = 0.5
    """Share of a replica's own parameters in what it goes on from, when a fragment has arrived."""
    outer: StreamingOuterOptions = StreamingOuterOptions()
    """The outer optimizer."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How pseudo-gradients are summed on the way."""

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if self.delay >= self.every:
            raise ValueError(
                f"delay={self.delay} is not below every={self.every}: a fragment arrives before it is sent again"
            )
        if self.fragments > self.every:
            raise ValueError(f"fragments={self.fragments} is above every={self.every}: each is sent in another step")
        return self

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """Each fragment when it is its turn, with two numbers; at the end all, and the targets of each."""
        if steps == 0:
            return 0
        values = self._values(shapes, members)
        told = all_reduce_bytes(2 * COUNT_BYTES, members)
        end = sum(values) + all_reduce_bytes((1 + self.fragments) * COUNT_BYTES, members)
        return end + sum(len(self.turns(p, steps)) * (sent + told) for p, sent in enumerate(values))

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """At the end; and in each turn, of what does not go on while steps are computed."""
        if steps == 0:
            return 0
        turns = 0
        for p, part in enumerate(self._parts(shapes)):
            once = self.reducer.late_delays(part, members) if self.delay > 0 else self._turn_delays(part, members)
            turns += len(self.turns(p, steps)) * once
        return turns + self._end_delays(shapes, members)

    def exchange_s(self, network: Network, load: Load) -> float:
        """See ``Timed``: a fragment is on its way while ``delay`` steps are computed, or those up to the next one."""
        steps, members = load.steps, load.members
        told = all_reduce_bytes(2 * COUNT_BYTES, members)
        beside = min(self.delay, self.every // self.fragments)
        waited_s = 0.0
        for p, part in enumerate(self._parts(load.shapes)):
            late = self.reducer.late_delays(part, members)
            sent = self.reducer.wire_bytes(part, members) + told
            once_s = network.seconds(sent, self._turn_delays(part, members) - late)
            for turn in self.turns(p, steps):
                waited_s += max(0.0, once_s - min(beside, steps - turn) * load.compute_s) + network.seconds(0, late)
        end = sum(self._values(load.shapes, members)) + all_reduce_bytes((1 + self.fragments) * COUNT_BYTES, members)
        return waited_s + network.seconds(end, self._end_delays(load.shapes, members))

    def _parts(self, shapes: Shapes) -> list[Shapes]:
        """Of each fragment."""
        return [{name: shapes[name] for name in names} for names in dealt(shapes, self.fragments)]

    def _values(self, shapes: Shapes, members: int) -> list[int]:
        """Bytes of each fragment."""
        return [self.reducer.wire_bytes(part, members) for part in self._parts(shapes)]

    def _turn_delays(self, part: Shapes, members: int) -> int:
        """Of one fragment: with a delay two numbers go beside it, else before."""
        numbers, sums = all_reduce_delays(2 * COUNT_BYTES, members), int(self.reducer.delays(part, members))
        return max(numbers, sums) if self.delay > 0 else numbers + sums

    def _end_delays(self, shapes: Shapes, members: int) -> int:
        """Targets of all fragments, then these at once, but for what begins when each is waited for."""
        parts = self._parts(shapes)
        late = [int(self.reducer.late_delays(part, members)) for part in parts]
        first = [int(self.reducer.delays(part, members)) - after for part, after in zip(parts, late, strict=True)]
        return all_reduce_delays((1 + self.fragments) * COUNT_BYTES, members) + max(first) + sum(late)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The parameters agreed on, the outer momentum if there is any, the reducer's, and two numbers a fragment."""
        parts = [{name: shapes[name] for name in names} for names in dealt(shapes, self.fragments)]
        copies = 1 + (self.outer.momentum > 0)
        kept = copies * sum(4 * math.prod(shape) for shape in shapes.values()) + 2 * COUNT_BYTES * self.fragments
        summed: int = sum(self.reducer.state_bytes(part) for part in parts)
        return kept + summed

    def turn(self, fragment: int) -> int:
        """The step in which a fragment is first sent."""
        return self.every * (fragment + 1) // self.fragments

    def turns(self, fragment: int, steps: int) -> range:
        """All steps in which it is sent, but for the last of the run."""
        return range(self.turn(fragment), steps, self.every)

    def build(self, context: SyncContext) -> "StreamingSync":
        """The strategy at work."""
        return StreamingSync(context, self)


def dealt(names: Sequence[str] | Shapes, fragments: int) -> list[list[str]]:
    """The names of parameters by fragment. The first number in a name is that of its block, as in transformers."""
    parts: list[list[str]] = [[] for _ in range(fragments)]
    for name in names:
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        parts[int(number[1]) % fragments if number else -1].append(name)
    return parts


class _Fragment:
    """One fragment on one rank, which may hold nothing of it."""

    def __init__(self, shards: list[Shard], context: SyncContext, options: StreamingDiLoCo) -> None:
        self.shards = shards
        self.reducer = options.reducer.build(context)
        self.reducer.start(shards)
        self.outer = OuterSGD(options.outer)
        self.wait: Wait | None = None
        """For the sums of what was sent, whose outer step is still to be taken."""
        self.told = torch.zeros(2, dtype=torch.float64)
        """By what the sums are divided, and how many were asked to stop; when they are there."""


class StreamingSync(Alone):
    """Streaming DiLoCo on one rank."""

    def __init__(self, context: SyncContext, options: StreamingDiLoCo) -> None:
        super().__init__(context)
        self._context, self._options = context, options
        self._fragments: list[_Fragment] = []
        self._agreed: dict[str, Tensor] = {}
        self._windows = torch.zeros(options.fragments, dtype=torch.float64)  # targets since a fragment was last sent
        self._sent = torch.zeros(options.fragments, dtype=torch.float64)  # the step of what is still to be mixed in
        self._asked = self._all_stop = False

    def start(self, replica: Replica) -> None:
        """Check that replicas start equal, and deal out the parameters."""
        super().start(replica)
        shards = {shard.name: shard for shard in replica.shards}
        self._agreed = {name: shard.local.clone() for name, shard in shards.items()}
        for names in dealt(list(shards), self._options.fragments):
            fragment = _Fragment([shards[name] for name in names], self._context, self._options)
            fragment.outer.start({name: self._agreed[name] for name in names})
            self._fragments.append(fragment)

    def total(self, values: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """This replica's own values. All stop when a fragment arrives with which one said that it was asked to.

        Where all are waited for, they say it with their targets: ``update`` tells.
        """
        self._asked = stop
        if self._link.size == 1 or self._talks(self._step):
            return values, stop and self._link.size == 1
        due = self._due()
        self._arrive(*due)
        return values, any(self._fragments[p].told[1].item() > 0 for p in due)

    def update(self, replica: Replica) -> Finish:
        """As all that learn alone; and say whether all stop."""
        self._all_stop = False
        finish = super().update(replica)
        return replace(finish, stop=self._all_stop)

    def is_agreed(self, step: int) -> bool:
        """After the last step; and where it is DiLoCo, when that is."""
        options = self._options
        is_diloco = options.fragments == 1 and options.delay == 0 == options.mixing
        return step == self._steps or (is_diloco and step % options.every == 0)

    def agreed(self, replica: Replica) -> Mapping[str, Tensor]:
        """Those agreed on last, with what has been sent."""
        self._arrive(*range(self._options.fragments))
        return self._agreed

    def state(self) -> Mapping[str, SyncState]:
        """What was agreed on, with what has been sent; what is still to be mixed in, and the targets since."""
        self._arrive(*range(self._options.fragments))
        state = {"windows": SyncState(self._windows, rule="fresh"), "sent": SyncState(self._sent)}
        state |= {f"{name}/agreed": SyncState(tensor, like=name) for name, tensor in self._agreed.items()}
        for fragment in self._fragments:
            state |= {**fragment.outer.state(), **fragment.reducer.state()}
        return state

    def _talks(self, step: int) -> bool:
        """Whether all are waited for: at the end, and in every exchange without delay."""
        return step == self._steps or (self._options.delay == 0 and bool(self._turns(step)))

    def _turns(self, step: int) -> list[int]:
        """The fragments that are sent in a step."""
        options = self._options
        return [p for p in range(options.fragments) if (step - options.turn(p)) % options.every == 0]

    def _due(self) -> list[int]:
        """The fragments that are mixed in in this step; in the last one all that are on their way."""
        latest = self._steps if self._step == self._steps else self._step - self._options.delay
        return [p for p, sent in enumerate(self._sent.tolist()) if 0 < sent <= latest]

    @torch.no_grad()
    def _stepped(self, replica: Replica, targets: int) -> None:
        self._windows += targets
        due, turns, mixing = self._due(), self._turns(self._step), self._options.mixing
        for p in due:
            self._mix(p, mixing)
        if self._step == self._steps:
            self._exchange(range(self._options.fragments), mixing=0.0)
        elif self._talks(self._step):
            self._exchange(turns, mixing=mixing)
        else:
            for p in turns:
                self._send(p)
        if due or self._talks(self._step):
            replica.refresh()

    def _exchange(self, turns: Sequence[int], *, mixing: float) -> None:
        """All at once: send, wait, step and mix."""
        learned = [self._windows[p].item() for p in turns]
        *all_targets, stops = self._sum(*learned, float(self._asked)).tolist()
        self._all_stop = stops > 0
        for p, own, targets in zip(turns, learned, all_targets, strict=True):
            if self._options.delay == 0 or self._link.size == 1:
                share, total = share_of(own, targets, self._link.size), 1.0
            else:  # as those before: what a reducer has left out is in the units of a sum
                share, total = own / self._window(p), targets / self._window(p)
            self._start(p, share)
            self._fragments[p].told = torch.tensor([total, 0.0], dtype=torch.float64)
        for p in turns:
            self._mix(p, mixing)

    def _send(self, p: int) -> None:
        """Start the sums, times the targets of each, and that of the targets. Of one replica the mean is its own.

        Targets are those of a step on average: what a reducer has left out of a long window would else be worth more in
        a short one.
        """
        learned = self._windows[p].item() / self._window(p) if self._link.size > 1 else 1.0
        fragment = self._fragments[p]
        told = torch.tensor([learned, float(self._asked)], dtype=torch.float64, device=self._device)
        pending = self._link.all_reduce(told)
        self._start(p, learned)
        sums = fragment.wait
        assert sums is not None

        def wait() -> Mapping[str, Tensor]:
            pending.wait()
            fragment.told = told.cpu()
            return sums()

        fragment.wait = wait

    def _window(self, p: int) -> int:
        """Steps since a fragment was last sent, or since the start."""
        after = self._step - self._options.turn(p)
        return self._step if after <= 0 else after % self._options.every or self._options.every

    def _start(self, p: int, share: float) -> None:
        fragment, values = self._fragments[p], {}
        for shard in fragment.shards:
            own = wide(shard.local)
            values[shard.name] = own if self._options.reducer.is_exact else wide(self._agreed[shard.name]) - own
        self._sent[p], self._windows[p] = self._step, 0.0
        fragment.wait = fragment.reducer.start_sum(values, share, self._step)

    def _arrive(self, *fragments: int) -> None:
        """Wait for what was sent, and take the outer step."""
        for p in fragments:
            fragment = self._fragments[p]
            if fragment.wait is None:
                continue
            sums, fragment.wait = fragment.wait(), None
            targets = fragment.told[0].item()
            fragment.reducer.settle([shard.name for shard in fragment.shards] if targets == 0 else ())
            if targets == 0:
                continue  # no replica has learned anything
            for shard in fragment.shards:
                agreed = self._agreed[shard.name]
                before, mean = wide(agreed), sums[shard.name] / targets
                mean = mean if self._options.reducer.is_exact else before - mean
                after = fragment.outer.step(shard.name, before, mean, 0.0)
                self._round(shard, after, agreed, "exchange", int(self._sent[p]))

    def _mix(self, p: int, mixing: float) -> None:
        """Go on from what was agreed on, and some of one's own."""
        self._arrive(p)
        for shard in self._fragments[p].shards:
            agreed = self._agreed[shard.name]
            if mixing == 0:
                shard.local.copy_(agreed)
            else:
                mixed = torch.lerp(wide(agreed), wide(shard.local), mixing)
                self._round(shard, mixed, shard.local, "mixing", self._step)
        self._sent[p] = 0.0
