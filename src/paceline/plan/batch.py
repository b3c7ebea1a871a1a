"""How many sequences a step has, and how they are cut into micro-batches on each data-parallel rank."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from paceline.config import BatchConfig
from paceline.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The global batch, dealt out to ``data_parallel`` ranks.

    Every rank runs the same number of micro-batches of the same number of rows; where the sequences do not divide, the
    places left over are filled with rows of zero weight.
    """

    sequences: int
    sequence_tokens: int
    data_parallel: int
    micro: int
    """Rows of one forward pass on one rank."""
    micro_batches: int
    """Forward passes of one rank in one step."""

    @property
    def tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.sequences * self.sequence_tokens

    @property
    def filling(self) -> int:
        """Zero-weight rows of one step over all ranks."""
        return self.data_parallel * self.micro_batches * self.micro - self.sequences


def plan_batch(batch: BatchConfig, data_parallel: int) -> BatchPlan:
    """Deal the batch out; ``PlanError`` for fewer sequences than ranks, or ``micro`` above a rank's share.

    With ``micro=auto``, which is settled in the run itself, as if all of the share fitted.
    """
    if batch.sequences < data_parallel:
        raise PlanError(
            f"batch.sequences={batch.sequences} is fewer than the {data_parallel} data-parallel ranks, so some would "
            f"have nothing to do. Use at least {data_parallel} sequences, or fewer replicas."
        )
    share = -(-batch.sequences // data_parallel)
    micro = batch.micro if isinstance(batch.micro, int) else share
    if micro > share:
        raise PlanError(
            f"batch.micro={micro} is more than a rank's share of {share} sequences "
            f"({batch.sequences} over {data_parallel}). Use {share} or fewer."
        )
    return BatchPlan(
        sequences=batch.sequences,
        sequence_tokens=batch.sequence_tokens,
        data_parallel=data_parallel,
        micro=micro,
        micro_batches=-(-share // micro),
    )


def micro_sizes(share: int) -> list[int]:
    """Rows of one micro-batch that are worth trying, falling: for each number of micro-batches, the fewest that do."""
    return sorted({-(-share // count) for count in range(1, share + 1)}, reverse=True)


def sequences_of(batch: BatchConfig, step: int) -> int:
    """Sequences of step ``step`` (1-based) over all ranks: a function of the config and the step alone.

    While the batch grows, it does so in rises of ``by`` sequences at even distances, the last of them just after
    ``warmup.steps``, and smaller where what is left is no multiple.
    """
    grows = batch.warmup
    if grows is None or step > grows.steps:
        return batch.sequences
    rises = -(-(batch.sequences - grows.start) // grows.by)
    return min(batch.sequences, grows.start + grows.by * (rises * (step - 1) // grows.steps))


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch of every step of a run."""

    full: BatchPlan
    growing: tuple[BatchPlan, ...] = ()
    """Of the first steps, in order; all others are ``full``."""

    def at(self, step: int) -> BatchPlan:
        """Of step ``step``, 1-based."""
        return self.growing[step - 1] if step <= len(self.growing) else self.full

    def sequences(self, first: int, last: int) -> int:
        """Sequences of steps ``first`` to ``last`` together."""
        return self._until(last) - self._until(first - 1)

    def _until(self, step: int) -> int:
        grown = min(step, len(self.growing))
        return self._sums[grown] + (step - grown) * self.full.sequences

    @cached_property
    def _sums(self) -> tuple[int, ...]:
        return tuple(accumulate((plan.sequences for plan in self.growing), initial=0))
