"""Which blocks a pipeline stage gets, which rank runs it, and what each schedule of micro-batches needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from paceline.config import LayoutConfig
from paceline.errors import PlanError
from paceline.plan.batch import BatchPlan


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a named schedule of ``torch.distributed.pipelining`` is like."""

    torch_name: str
    order: Literal["single", "loop", "v"]
    """Stages of a rank: one; several, dealt out round after round; two, dealt out there and back again."""
    splits_backward: bool = False
    """Gradients of weights are computed later than those of the hidden states."""


KINDS = {
    "gpipe": Kind(torch_name="GPipe", order="single"),
    "1f1b": Kind(torch_name="1F1B", order="single"),
    "interleaved1f1b": Kind(torch_name="Interleaved1F1B", order="loop"),
    "looped_bfs": Kind(torch_name="LoopedBFS", order="loop"),
    "interleaved_zero_bubble": Kind(torch_name="InterleavedZeroBubble", order="loop", splits_backward=True),
    "zbv": Kind(torch_name="ZBVZeroBubble", order="v", splits_backward=True),
    "dualpipev": Kind(torch_name="DualPipeV", order="v", splits_backward=True),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule on the ranks of a pipeline."""

    name: str
    """One of ``KINDS``, or the path of a CSV file."""
    pipeline: int
    ranks: tuple[int, ...]
    """Of each stage, first to last: the rank that runs it."""
    splits_backward: bool
    fixed_micro_batches: int | None = None
    """How many a CSV file is written for; None for a schedule that has a rule instead."""

    def allows(self, micro_batches: int) -> bool:
        """Whether it can run so many micro-batches in a step."""
        if self.fixed_micro_batches is not None:
            return micro_batches == self.fixed_micro_batches
        if self.name in ("1f1b", "dualpipev"):
            return micro_batches >= len(self.ranks)
        if self.name.startswith("interleaved"):
            return micro_batches % max(1, micro_batches // self.pipeline) == 0
        return micro_batches >= 1

    @property
    def needs(self) -> str:
        """What ``allows`` asks for, in words."""
        if self.fixed_micro_batches is not None:
            return f"exactly {self.fixed_micro_batches}"
        if self.name in ("1f1b", "dualpipev"):
            return f"at least {len(self.ranks)}, one for each stage"
        if self.name.startswith("interleaved"):
            return f"rounds of equal length, as with a multiple of {self.pipeline}"
        return "at least 1"


def schedule_of(name: str, pipeline: int) -> Schedule:
    """The schedule that ``layout.schedule`` names; ``PlanError`` for one that does not fit ``pipeline`` ranks."""
    if name.endswith(".csv"):
        return _read_csv(name, pipeline)
    if name not in KINDS:
        raise PlanError(f"layout.schedule={name!r}: expected one of {', '.join(KINDS)}, or a CSV file (name.csv)")
    kind, line = KINDS[name], tuple(range(pipeline))
    there_and_on = {"single": line, "loop": line + line, "v": line + line[::-1]}
    return Schedule(name=name, pipeline=pipeline, ranks=there_and_on[kind.order], splits_backward=kind.splits_backward)


def check_schedule(layout: LayoutConfig, batch: BatchPlan, *, compiled: bool) -> None:
    """Raise ``PlanError`` if a layout's schedule does not go with the number of micro-batches, ZeRO or compilation."""
    if layout.pipeline == 1:
        return
    schedule = schedule_of(layout.schedule, layout.pipeline)
    if schedule.splits_backward and compiled:
        raise PlanError(
            f"layout.schedule={layout.schedule} computes the gradients of weights apart, which compiled blocks cannot. "
            "Use train.compile=false, or schedule=interleaved1f1b"
        )
    if schedule.splits_backward and layout.zero == 3 and layout.shard * layout.context > 1:
        raise PlanError(
            f"layout.schedule={layout.schedule} computes the gradients of weights apart, when zero=3 has already given "
            "up the gathered weights. Use zero=2, or schedule=interleaved1f1b"
        )
    if not schedule.allows(batch.micro_batches):
        raise PlanError(
            f"layout.schedule={layout.schedule} on pipeline={layout.pipeline} needs {schedule.needs}, but a step has "
            f"{batch.micro_batches} micro-batches (of batch.micro={batch.micro} sequences). {_mend(schedule, batch)}"
        )


def balance(costs: Sequence[float], stages: int, *, tail: float = 0.0) -> tuple[slice, ...]:
    """Cut a line of parts into ``stages`` neighbouring groups, none empty, so that the dearest is as cheap as can be.

    ``tail`` is the cost of what follows the last part (the head), and goes to the last stage. Of equally good cuts the
    most even one is taken, and of these that with more in later stages, where fewer micro-batches are under way. Raises
    ``PlanError`` if there are fewer parts than stages.
    """
    parts = len(costs)
    if parts < stages:
        raise PlanError(f"{stages} stages are asked for, but there are only {parts} blocks to deal out")
    sums = [0.0, *accumulate(costs)]
    sums[-1] += tail
    # best[i]: for the parts before i in the stages so far, (dearest stage, sum of squares, where the last stage begins)
    best: list[tuple[float, float, int] | None] = [(sums[i], sums[i] ** 2, 0) if i else None for i in range(parts + 1)]
    begins = [best]
    for stage in range(1, stages):
        following: list[tuple[float, float, int] | None] = [None] * (parts + 1)
        for end in range(stage + 1, parts + 1):
            following[end] = min(
                (max(before[0], cost := sums[end] - sums[begin]), before[1] + cost**2, begin)
                for begin in range(stage, end)
                if (before := best[begin]) is not None
            )
        best = following
        begins.append(best)
    cuts, end = [], parts
    for row in reversed(begins):
        entry = row[end]
        assert entry is not None
        cuts.append(slice(entry[2], end))
        end = entry[2]
    return tuple(reversed(cuts))


def _mend(schedule: Schedule, batch: BatchPlan) -> str:
    share = -(-batch.sequences // batch.data_parallel)
    legal = [micro for micro in range(1, share + 1) if schedule.allows(-(-share // micro))]
    if legal:
        return f"Use batch.micro={min(legal, key=lambda micro: abs(micro - batch.micro))}"
    return f"No batch.micro gives that with batch.sequences={batch.sequences}: use more sequences, or schedule=gpipe"


_ACTION = re.compile(r"(\d+)(F|B|I|W)(\d+)")
_CELL = re.compile(r"\s*|\d+[FBIW]\d+|\((\d+[FBIW]\d+;?)*\)OVERLAP_F_B")


def _read_csv(name: str, pipeline: int) -> Schedule:
    """A file with one line a rank, whose cells say in order what it does: ``1F0`` runs stage 1 forward on the
    micro-batch 0, ``B`` backward, ``I`` and ``W`` the two halves of backward; an empty cell waits."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"layout.schedule={name}: cannot be read ({error})") from None
    wrong = [cell for line in lines for cell in line.split(",") if not _CELL.fullmatch(cell.strip(' "'))]
    if wrong:
        raise PlanError(f"layout.schedule={name}: {wrong[0]!r} is no action; expected stage, F, B, I or W, micro-batch")
    if len(lines) != pipeline:
        raise PlanError(f"layout.schedule={name} has {len(lines)} lines; expected one for each of pipeline={pipeline}")
    actions = [[(int(s), kind, int(m)) for s, kind, m in _ACTION.findall(line)] for line in lines]
    ranks = {stage: rank for rank, line in enumerate(actions) for stage, _, _ in line}
    stages, micro_batches = len(ranks), 1 + max((m for line in actions for _, _, m in line), default=0)
    every = [(stage, m) for stage in range(stages) for m in range(micro_batches)]
    forward = [(stage, m) for line in actions for stage, kind, m in line if kind == "F"]
    backward = [(stage, m) for line in actions for stage, kind, m in line if kind in "BI"]
    weights = [(stage, m) for line in actions for stage, kind, m in line if kind in "BW"]
    if not all(sorted(done) == every for done in (forward, backward, weights)):
        raise PlanError(
            f"layout.schedule={name}: each of {stages} stages has to run each of {micro_batches} micro-batches once "
            "forward (F) and once backward (B, or I and W), on one rank"
        )
    if any(rank != ranks[stage] for rank, line in enumerate(actions) for stage, _, _ in line):
        raise PlanError(f"layout.schedule={name}: a stage stands on two lines; expected all of its actions on one")
    last = [m for stage, m in forward if stage == stages - 1]
    if last != sorted(last):
        raise PlanError(f"layout.schedule={name}: the last stage has to run the micro-batches forward in their order")
    return Schedule(
        name=name,
        pipeline=pipeline,
        ranks=tuple(ranks[stage] for stage in range(stages)),
        splits_backward=any(kind == "W" for line in actions for _, kind, _ in line),
        fixed_micro_batches=micro_batches,
    )
