"""Averages of the weights over training, beside the weights that are trained."""

from typing import ClassVar, Literal

from paceline.config import Count, Natural, Options


class WeightAverage(Options):
    """Base of the config classes of averages."""

    every: Count | Literal["cycle"] = 1
    """Steps between the weights that are taken; ``cycle``: those at the end of each cycle of the schedule."""
    start: Natural = 0
    """Weights of the first so many steps are not taken."""
    evaluate: bool = True
    """Held-out measurements and samples are of the average, once there is one."""
    export: bool = True
    """The export is of the average, once there is one."""

    keeps: ClassVar[bool] = True
    """Whether there is an average: one more copy of the parameters in fp32."""

    def weight(self, taken: int) -> float:
        """average = average + weight (parameters - average), when ``taken`` have been taken before; 1 for the first."""
        raise NotImplementedError


class NoAverage(Options):
    """None: what is trained is what is measured and exported."""

    keeps: ClassVar[bool] = False
    every: ClassVar[int] = 0
    start: ClassVar[int] = 0
    evaluate: ClassVar[bool] = False
    export: ClassVar[bool] = False

    def weight(self, taken: int) -> float:
        """Nothing is taken."""
        return 0.0
