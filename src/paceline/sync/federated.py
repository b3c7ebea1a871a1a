"""Federated learning: clients, maybe thousands, learn from data of their own, and a server joins what they learned.

    step t of the run is round t:
      clients of the round   each goes from theta_t, with a new optimizer, some local steps on its own data
      update                 mean over them of (client's weights - theta_t), each by its weight
      server                 theta_t+1 from theta_t and the update, by the server rule

The clients of a round are dealt to the replicas in turn, and each replica trains its own one after the other. All
replicas hold the same weights before and after every round, so everything around a step (checkpoints, evaluations,
averages) is what it is elsewhere, and what is learned does not depend on the number of replicas.

FedProx (Li et al. 2020, arXiv 1812.06127): ``proximal`` mu adds mu/2 ||theta - theta_t||^2 to a client's loss.
SCAFFOLD, q-FedAvg: ``control``, ``aggregation``. Cohorts, stragglers and FedBuff: ``data.rounds``.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from paceline.config import ChosenFrom, Count, Natural, NonNegative, Options, Positive, SyncOptions
from paceline.data.rounds import Rules
from paceline.plan.wire import (
    all_gather_bytes,
    all_gather_delays,
    all_reduce_bytes,
    all_reduce_delays,
    broadcast_delays,
)
from paceline.registry import AGGREGATES, REDUCERS, SERVERS
from paceline.sync.aggregates.mean import Mean as MeanOfClients
from paceline.sync.base import COUNT_BYTES, Shapes, SyncContext
from paceline.sync.federation import TOLD, FederatedSync
from paceline.sync.privacy import PrivacyOptions
from paceline.sync.reducers.mean import Mean
from paceline.sync.secure.mean import SecureOptions
from paceline.sync.servers.fedavg import FedAvg


class BufferOptions(Options):
    """Asynchronous rounds (FedBuff): a round is over when so many updates have come."""

    updates: Count = 10
    """K, updates of a round."""
    max_staleness: Natural = 10
    """An update is thrown away if more rounds than this ended since its client began. As many weights are kept."""


class Federated(SyncOptions):
    """Clients learn from data of their own; a server joins what they learned, round by round."""

    clients_per_round: Count = 10
    """Clients of a round, drawn without replacement from (seed, round); with ``buffer``, at work at the same time."""
    local_steps: Count | None = None
    """Steps of a client in a round, of ``batch.sequences`` each; in place of ``epochs``."""
    epochs: Count | None = None
    """Passes of a client over its own data in a round; default, without ``local_steps``: 1."""
    server: Annotated[Any, ChosenFrom(SERVERS)] = FedAvg()
    """What the server does with the mean update."""
    aggregate: Annotated[Any, ChosenFrom(AGGREGATES)] = MeanOfClients()
    """How clients' updates become one: the mean, or a rule that a few false ones cannot lead astray."""
    weights: Literal["targets", "data", "uniform"] = "targets"
    """By what clients count in the mean: targets they learned from in the round, rows they have, or all the same."""
    proximal: NonNegative = 0.0
    """FedProx's mu: how strongly clients are held near the weights they began from."""
    scaffold: bool = False
    """Correct each client's drift by control variates, which are kept for every client; for plain SGD."""
    q: NonNegative = 0.0
    """q-FedAvg: above 0, clients with a high loss count for more."""
    moments: Literal["fresh", "keep"] = "fresh"
    """Of a client's optimizer: ``fresh`` in every round, or ``keep`` those of its last one, for every client."""
    over_selection: NonNegative = 0.0
    """Share of clients that are asked on top of ``clients_per_round``; the last to come are not waited for."""
    deadline: Positive | None = None
    """Whoever takes longer is left out, but for the quickest; in local steps of a client of median speed."""
    speed_spread: NonNegative = 0.0
    """How unlike simulated clients are in speed: a local step takes exp(spread x normal number). 0: all alike."""
    buffer: BufferOptions | None = None
    """Asynchronous rounds on the simulated clock."""
    secure: SecureOptions | None = None
    """Secure aggregation, as simulated clients would do it: a server that sees sums only."""
    privacy: PrivacyOptions | None = None
    """Clipping and noise, so that the weights do not tell whether a client took part."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How sums over replicas are made on the way; one that is exact."""

    keeps_equal: ClassVar[bool] = True
    in_rounds: ClassVar[bool] = True

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.local_steps is not None and self.epochs is not None:
            raise ValueError("local_steps and epochs both say how long a client learns. Leave one of them out")
        if not self.reducer.is_exact:
            raise ValueError(
                "reducer compresses what replicas send each other, and replicas are no clients: what is learned would "
                "depend on their number. Use mean"
            )
        for option, why in (("scaffold", "SCAFFOLD's mean"), ("q", "q-FedAvg, which weighs by loss,")):
            if getattr(self, option) and self.weights != "uniform":
                raise ValueError(f"{why} counts clients alike: {option} needs weights=uniform, not {self.weights}")
        if self.scaffold and (self.q or self.buffer):
            raise ValueError("scaffold with q or buffer is not built. Leave one of them out")
        if self.moments == "keep" and self.buffer:
            raise ValueError("moments=keep with buffer is not built: a client may come twice in a round. Use fresh")
        if self.buffer is not None:
            for option in ("over_selection", "deadline", "q"):
                if getattr(self, option):
                    raise ValueError(f"buffer waits for no cohort, so {option} has no meaning. Leave one of them out")
            if self.speed_spread == 0:
                raise ValueError("buffer needs clients of unlike speed: set speed_spread, for example 0.5")
        if self.deadline is not None and self.speed_spread == 0 and self.local_steps is not None:
            raise ValueError("deadline needs clients of unlike speed: set speed_spread, for example 0.5")
        if self.aggregate.is_robust:
            self._check_robust()
        if self.privacy is not None:
            self._check_private(self.privacy)
        if self.secure is not None:
            self._check_secure(self.secure)
        return self

    def _check_secure(self, secure: SecureOptions) -> None:
        """What can be done with a sum of which no term is known."""
        if self.aggregate.is_robust:
            raise ValueError("a robust aggregate looks at updates one by one, which secure hides. Use one of the two")
        if self.weights != "uniform":
            raise ValueError(f"secure adds up what it cannot weigh: it needs weights=uniform, not {self.weights}")
        for option in ("q", "scaffold", "buffer"):
            if getattr(self, option):
                raise ValueError(f"{option} with secure is not built. Leave one of them out")
        asked = math.ceil(self.clients_per_round * (1 + self.over_selection))
        if problem := secure.refused(asked, self.clients_per_round):
            raise ValueError(problem)

    def _check_private(self, privacy: PrivacyOptions) -> None:
        """What the account of privacy counts on: cohorts of one size by a draw, and one bounded sum."""
        if self.weights != "uniform":
            raise ValueError(f"privacy bounds what one client adds: it needs weights=uniform, not {self.weights}")
        for option in ("over_selection", "deadline", "buffer"):
            if getattr(self, option):
                raise ValueError(f"with {option} speed says who takes part, and not a draw alone: not with privacy")
        for option in ("scaffold", "q"):
            if getattr(self, option):
                raise ValueError(f"{option} tells more of clients than their clipped updates: not with privacy")
        if self.aggregate.is_robust:
            raise ValueError("a robust aggregate is no bounded sum, to which noise could be measured: not with privacy")
        if problem := privacy.refused(self.clients_per_round):
            raise ValueError(problem)

    def _check_robust(self) -> None:
        """What a rule needs to be one: all the updates it counts with, one by one, and clients that count alike."""
        if self.weights != "uniform":
            raise ValueError(f"robust rules count clients alike: aggregate needs weights=uniform, not {self.weights}")
        for option in ("scaffold", "q", "deadline"):
            if getattr(self, option):
                raise ValueError(f"{option} goes by what clients say, or leaves some out: not with a robust aggregate")
        if problem := self.aggregate.refused(self.updates):
            raise ValueError(problem)

    @property
    def updates(self) -> int:
        """Updates of a round, if nobody is late."""
        return self.buffer.updates if self.buffer else self.clients_per_round

    def rules(self, sequences: int) -> Rules:
        """How rounds are made, with ``sequences`` in a local step."""
        return Rules(
            clients=self.clients_per_round,
            sequences=sequences,
            local_steps=self.local_steps,
            epochs=self.epochs or 1,
            over_selection=self.over_selection,
            deadline_s=self.deadline,
            spread=self.speed_spread,
            buffer=self.buffer.updates if self.buffer else None,
            max_staleness=self.buffer.max_staleness if self.buffer else 0,
        )

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """In every round the sum of updates, or all of them, a few numbers and, on average, SCAFFOLD's variates."""
        if self.aggregate.is_robust:
            each = 4 * -(-self.updates // members)
            collected = sum(all_gather_bytes(each * math.prod(shape), members) for shape in shapes.values())
            return steps * (collected + all_reduce_bytes(TOLD * COUNT_BYTES, members))
        if self.secure is not None:
            masked = all_reduce_bytes(8 * sum(math.prod(shape) for shape in shapes.values()), members)
            told = TOLD + (self.privacy is not None)
            return steps * (masked + all_reduce_bytes(told * COUNT_BYTES, members))
        sums: int = self.reducer.wire_bytes(shapes, members)
        numbers = TOLD + 1 + (self.privacy is not None)
        if self.scaffold:
            variate = sum(4 * math.prod(shape) for shape in shapes.values())
            sums += self.updates * (members - 1) * variate // members
        return steps * (sums + all_reduce_bytes(numbers * COUNT_BYTES, members))

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """In every round the numbers, then updates; then variates and moments of one client after the other."""
        if self.aggregate.is_robust:
            sums = all_gather_delays(members)
        elif self.secure is not None:
            sums = all_reduce_delays(8 * sum(math.prod(shape) for shape in shapes.values()), members)
        else:
            sums = self.reducer.delays(shapes, members)
        numbers = all_reduce_delays((TOLD + 1 + (self.privacy is not None)) * COUNT_BYTES, members)
        copies = self.updates * (self.scaffold + 3 * (self.moments == "keep"))
        return steps * (numbers + sums + copies * broadcast_delays(members))

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """Weights of the round, updates, the server's memory; variates and moments of each client come on top."""
        copies: int = 3 + self.server.copies + (self.buffer.max_staleness if self.buffer else 0)
        if self.aggregate.is_robust:
            copies += 2 * self.updates
        if self.secure is not None:
            copies += 8  # fp64 and int64 vectors on their way to 32 bits and back
        kept: int = self.reducer.state_bytes(shapes)
        return kept + copies * sum(4 * math.prod(shape) for shape in shapes.values())

    def build(self, context: SyncContext) -> FederatedSync:
        """The strategy at work."""
        return FederatedSync(context, self)
