"""A parameter server (Dean et al. 2012; Li et al. 2014): servers hold the parameters and take the steps.

Each replica is a worker: it pushes the gradient of its own targets and pulls the weights that come of it. When these
are ready is the ``mode`` (``sync/server/coordinator.py``). Servers hold the optimizer's state and step with the run's
own optimizer. A replica's copy of that state is filled when a checkpoint is due, so a checkpoint is the same as with
any other sync. A single replica needs no server, and has none.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from paceline.config import Count, Fraction, Natural, Positive, SyncOptions, strategy_name
from paceline.errors import PlanError
from paceline.plan.network import Network
from paceline.plan.wire import MESSAGE_DELAYS, all_reduce_bytes, all_reduce_delays
from paceline.sync.base import COUNT_BYTES, Load, Shapes, SyncContext
from paceline.sync.server.channel import ROW_BYTES
from paceline.sync.server.worker import ParameterServerSync

_ANSWERS = 4
"""For which a worker waits in a step: of stage, commit, turn and pull."""


class ParameterServer(SyncOptions):
    """Servers hold the parameters; replicas push gradients and pull weights."""

    mode: Literal["sync", "async", "stale"] = "sync"
    """``sync``: all replicas' gradients make a step, as with all-reduce. ``async``: each replica's gradient is a step,
    at once. ``stale``: a replica may run ahead of the slowest by ``staleness`` steps."""
    staleness: Natural = 1
    """Of ``stale``; 0 is ``sync``."""
    backups: Natural = 0
    """Of ``sync``: a step is taken without the gradients of so many replicas, whichever are the slowest. What comes
    late is left out, which the end of the run counts, and its replica goes on with the step that the others are at."""
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
    sparse: bool = False
    """Push and pull only those rows of the input embedding that a step looks up. What is learned is the same. Not for
    an embedding that is the output head too: all its rows have a gradient."""
    timeout_s: Positive = 600.0
    """How long a server, or the slowest replica, is waited for."""
    lease_s: Positive | None = None
    """Of ``stale`` and ``async``, or with ``backups``: after so long without a connection a replica is given up, and
    the others no longer wait for it; longer than a step. It may come back. By default a replica is never given up."""

    @model_validator(mode="after")
    def _belongs(self) -> "ParameterServer":
        if self.mode != "async" and (self.compensation != "none" or self.scale_rate):
            raise ValueError(f"compensation and scale_rate are for mode=async, got mode={self.mode}")
        if self.mode == "sync" and self.lease_s is not None and not self.backups:
            raise ValueError("lease_s is for mode=async or stale, or with backups: else a step is of all replicas")
        if self.mode != "sync" and self.backups:
            raise ValueError(f"backups={self.backups} is for mode=sync, got mode={self.mode}")
        if self.sparse and self.compensation == "adaptive":
            raise ValueError(
                "compensation=adaptive changes an average of every value at every push, which sparse=true does not "
                "send; use compensation=constant"
            )
        return self

    is_served: ClassVar[bool] = True
    """It wants server processes."""

    @property
    def keeps_equal(self) -> bool:
        """In lock step only."""
        return self.is_lock_step

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on without a replica that is gone: then nothing but servers is between replicas."""
        return self.lease_s is not None

    @property
    def is_lock_step(self) -> bool:
        """Whether replicas wait for each other in every step."""
        return self.is_in_turn and not self.backups

    @property
    def is_in_turn(self) -> bool:
        """Whether a step ends before the next one begins: first all gradients are pushed, then all weights pulled."""
        return self.mode == "sync" or (self.mode == "stale" and self.staleness == 0)

    @property
    def tells(self) -> bool:
        """Whether replicas tell each other numbers in every step, for which they need all to be there."""
        return self.is_lock_step and not self.is_elastic

    @property
    def clips(self) -> bool:
        """Whether the norm that is clipped is that of a sum, which servers have."""
        return self.mode != "async"

    @property
    def sends_less(self) -> bool:
        """Whether ``wire_bytes`` is the most that can be: how many rows a step looks up depends on its batch, and who
        is late leaves out steps."""
        return self.sparse or self.backups > 0

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
        if self.backups >= config.all_replicas:
            raise PlanError(
                f"sync=parameter_server, backups={self.backups} of replicas={config.all_replicas} leaves no gradient "
                f"to wait for; at most {config.all_replicas - 1}"
            )
        if optimizer.sees != "values":
            reason = f"{name} looks at more than single values with their gradient, and a server has pieces of tensors"
        elif optimizer.averages:
            reason = f"{name} averages weights between steps, which servers take"
        if reason is not None:
            raise PlanError(f"sync=parameter_server: {reason}. Use adamw, adabelief, adagrad, lion, ftrl or sgd")
        if self.is_elastic and (config.early_stop is not None or config.spikes is not None):
            raise PlanError(
                "early_stop and spikes go back to a checkpoint together, and with sync=parameter_server, lease_s a "
                "replica may be gone. Leave them out, or lease_s"
            )
        if config.precision in {"fp16", "bf16_pure"}:
            raise PlanError(
                f"sync=parameter_server with precision={config.precision} is not built: servers step in fp32, without "
                "a loss scale. Use precision=bf16 or fp32"
            )
        if config.reduction != "fp32":
            raise PlanError(f"sync=parameter_server sums in fp32, not in reduction={config.reduction}. Use fp32")
        if config.perturb is not None:
            raise PlanError("perturb would move weights that are the servers'. Leave it out, or use sync=all_reduce")
        if self.sparse and config.average.keeps:
            raise PlanError(
                f"average={strategy_name(config.average)} with sync=parameter_server, sparse=true: an average needs "
                "all rows in every step. Use average=none or sparse=false"
            )
        asked = {**config.regularisation.model_dump()}
        asked |= {"clip_value": config.train.clip_value, "clip_block_norm": config.train.clip_block_norm}
        for key in (key for key, value in asked.items() if value):
            raise PlanError(
                f"{key}={asked[key]} with sync=parameter_server is not built: the step is the servers'. Use "
                "train.clip_norm, optimizer.weight_decay, or sync=all_reduce"
            )

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """In every step the gradients and, in lock step, a vote, two sums and a request to stop.

        With ``sparse`` it is at most that, and for every row of the tallest matrix its number, pushed and pulled.
        """
        if members == 1:
            return 0
        gradients = value_bytes * sum(math.prod(shape) for shape in shapes.values())
        told = all_reduce_bytes(3 * COUNT_BYTES, members) + all_reduce_bytes(COUNT_BYTES, members)
        rows = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=0) * self.sparse
        return steps * (gradients + 2 * ROW_BYTES * rows + told * self.tells)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """In every step the answers of servers and, in lock step, the sums. What is saved comes on top."""
        if members == 1:
            return 0
        told = all_reduce_delays(3 * COUNT_BYTES, members) + all_reduce_delays(COUNT_BYTES, members)
        return steps * (_ANSWERS * MESSAGE_DELAYS + told * self.tells)

    def exchange_s(self, network: Network, load: Load) -> float:
        """See ``Timed``: servers stand beside one replica, over whose link others' gradients come and weights go.

        Where a step ends before the next one begins one after the other, else at the same time.
        """
        values = load.value_bytes * sum(math.prod(shape) for shape in load.shapes.values())
        others = load.members - 1
        passing = 2 * others if self.is_in_turn else max(2 * (others > 0), others)
        return network.seconds(load.steps * passing * values, self.delays(load.shapes, load.members, load.steps))

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """What is pushed and what is pulled, once each."""
        return 2 * value_bytes * sum(math.prod(shape) for shape in shapes.values())

    def build(self, context: SyncContext) -> "ParameterServerSync":
        """The strategy at work."""
        return ParameterServerSync(self, context)
