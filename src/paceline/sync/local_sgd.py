"""Local SGD (Stich 2019, arXiv 1805.09767): steps of one's own, then the mean of the parameters.

theta <- sum over replicas of n_i theta_i / sum of n_i, with n_i the targets that replica i learned from since the last
mean. The moments of the optimizer are not averaged. With ``every: 1`` and plain SGD it is all-reduce.
"""

from typing import Annotated, Any

from paceline.config import ChosenFrom, Count, SyncOptions
from paceline.registry import REDUCERS
from paceline.sync.base import Shapes, SyncContext
from paceline.sync.periodic import PeriodicSync, periodic_delays, periodic_state_bytes, periodic_wire_bytes
from paceline.sync.reducers.mean import Mean


class LocalSGD(SyncOptions):
    """Learn alone for some steps, then go on from the mean of all replicas' parameters."""

    every: Count = 10
    """Steps from one mean to the next."""
    reducer: Annotated[Any, ChosenFrom(REDUCERS)] = Mean()
    """How parameters are summed on the way."""

    def wire_bytes(self, shapes: Shapes, members: int, steps: int, value_bytes: int = 4) -> int:
        """The parameters, once every so many steps."""
        return periodic_wire_bytes(self.reducer, self.every, shapes, members, steps)

    def delays(self, shapes: Shapes, members: int, steps: int) -> int:
        """Those of the exchanges."""
        return periodic_delays(self.reducer, self.every, shapes, members, steps)

    def state_bytes(self, shapes: Shapes, value_bytes: int = 4) -> int:
        """The reducer's; and the parameters agreed on, for one that sends differences from them."""
        return periodic_state_bytes(self.reducer, shapes, copies=int(not self.reducer.is_exact))

    def build(self, context: SyncContext) -> PeriodicSync:
        """The strategy at work."""
        reducer = self.reducer
        return PeriodicSync(context, every=self.every, reducer=reducer.build(context), is_exact=reducer.is_exact)
