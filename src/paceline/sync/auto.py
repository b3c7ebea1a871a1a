"""``sync: auto``: the strategy with which a run gets furthest in a given time, by the plan's numbers.

    seconds of a step   computation, of its reducer too, + what its exchanges take on the link, on average over the run
    worth of a step     what ``sync.measured`` says, of the rows in ``sync.rows``
    choice              the least seconds / worth

Nothing is timed, so the choice is a function of the config, and a run that goes on makes the same one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from paceline.config import Positive, SyncOptions, Text, choose
from paceline.errors import PlanError
from paceline.plan.network import Network
from paceline.registry import SYNCS
from paceline.sync import measured
from paceline.sync.base import Load, step_s
from paceline.sync.rows import ROWS

LEAST_EXCHANGES = 4
"""Of a run, in a strategy that exchanges now and then: with fewer its worth is not the one measured."""


def _is_link(text: str) -> str:
    Network.parse(text)
    return text


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row that could be taken."""

    name: str
    options: Any
    step_s: float
    worth: float

    @property
    def cost_s(self) -> float:
        """Seconds for what all-reduce learns in one step."""
        return self.step_s / self.worth


class Auto(SyncOptions):
    """Take the strategy and period with which a run gets furthest in a given time on a link."""

    link: Annotated[Text, AfterValidator(_is_link)]
    """Between two replicas: bits a second that each can send, and the delay one way, such as ``100mbit/25ms``."""
    compute_ms: Positive | None = None
    """What a step takes without its exchanges; default: the plan's operations at 100 GFLOP/s on each rank."""

    def candidates(
        self,
        load: Load,
        allows: Callable[[Any], bool],
        runs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Sequence[Candidate]:
        """All rows that could be taken, the best first; of equal ones that which stands first in the table.

        Left out are those that were not measured; whose period the run has not often enough; and that begin with a step
        of the run (``start``), which means nothing in a run of another length.
        ``allows``: what the rest of the config says of a strategy. ``PlanError`` if nothing is left.
        """
        link = Network.parse(self.link)
        found = []
        for name, row in ROWS.items():
            options: Any = choose(SYNCS, row)
            worth = measured.worth(name, measured.read() if runs is None else runs)
            too_rare = load.steps < LEAST_EXCHANGES * getattr(options, "every", 1)
            if worth is None or too_rare or hasattr(options, "start") or not allows(options):
                continue
            found.append(Candidate(name=name, options=options, step_s=step_s(options, link, load), worth=worth))
        if not found:
            raise PlanError("sync=auto finds nothing that this config allows. Choose by name, such as sync=all_reduce")
        return sorted(found, key=lambda candidate: candidate.cost_s)


def words(auto: Auto, load: Load, found: Sequence[Candidate]) -> str:
    """What was chosen, and why: beside all-reduce, or if that was chosen, beside what comes next."""
    assumed = "" if auto.compute_ms else ", assumed (sync.compute_ms sets it)"
    best, *others = found
    beside = [c for c in others if measured.BASELINE in (best.name, c.name)][:1]
    rows = " rather than ".join(
        f"{c.name}, {1e3 * c.step_s:,.4g} ms a step" + (f" worth {c.worth:.0%}" if c.name != measured.BASELINE else "")
        for c in (best, *beside)
    )
    return f"auto on {auto.link}, {1e3 * load.compute_s:,.4g} ms of computation a step{assumed}: {rows}"
