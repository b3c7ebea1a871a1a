"""The rows of the clients that train at one replica in a round."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from paceline.data.clients import Clients
from paceline.data.loader import MicroBatches
from paceline.data.rounds import Rounds, Visit
from paceline.data.rows import Row, Rows
from paceline.plan.batch import BatchPlan

Visits = Iterator[tuple[Visit, Iterator[MicroBatches]]]
"""Clients one after the other, each with the micro-batches of its local steps."""

_CLIENT_BITS = 32
"""Sample p of client k is number k 2^32 + p of the run, whatever else is learned."""


class ClientLoader:
    """Deals the clients of a round to the replicas in turn, and a client's rows to the ranks of its replica.

    ``replica`` of ``replicas`` trains the clients at places ``replica``, ``replica + replicas``, ... of the round. Slot
    b of a local step is of data-parallel rank b modulo their number; places without a row are filled at weight 0.0.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        clients: Clients,
        rounds: Rounds,
        batch: BatchPlan,
        *,
        replica: int,
        replicas: int,
        rank: int,
    ) -> None:
        assert 0 <= rank < batch.data_parallel, (rank, batch)
        self._rows, self._clients, self._batch, self._rank = rows, clients, batch, rank
        self._replica, self._replicas = replica, replicas
        self.rounds = rounds
        self.wait_s = 0.0
        """Rows are read when they are asked for."""

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._clients)

    @property
    def warning(self) -> str | None:
        """One sentence for the user where some clients never take part, or None."""
        if not (left_out := self._clients.left_out):
            return None
        return (
            f"data.clients: {left_out} clients have too little text for one sequence (batch.sequence_tokens) and never "
            f"take part; {len(self._clients)} do"
        )

    def visits(self, step: int) -> Visits:
        """The clients that train here in round ``step``."""
        for visit in self.rounds.at(step).visits[self._replica :: self._replicas]:
            yield visit, self.steps(visit)

    def steps(self, visit: Visit) -> Iterator[MicroBatches]:
        """The micro-batches of a client's local steps."""
        for begin in range(0, visit.rows, self._batch.sequences):
            yield self._step(visit, begin, min(self._batch.sequences, visit.rows - begin))

    def close(self) -> None:
        """Nothing runs in the background."""

    def _step(self, visit: Visit, begin: int, count: int) -> MicroBatches:
        plan, first = self._batch, visit.first + begin
        sources, rows = self._clients.draw(visit.client, first, count)
        number = (visit.client << _CLIENT_BITS) + first

        def row_of(slot: int) -> Row:
            if slot < count:
                return self._rows[int(sources[slot])].row(int(rows[slot]), number + slot)
            return replace(row_of(0), sequence=number + slot, weight=0.0)

        slots = range(self._rank, plan.data_parallel * plan.micro_batches * plan.micro, plan.data_parallel)
        share = [row_of(slot) for slot in slots]
        return [share[begin : begin + plan.micro] for begin in range(0, len(share), plan.micro)]
