"""Exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv 1703.01780)."""

from paceline.config import Fraction
from paceline.optim.average import WeightAverage


class Ema(WeightAverage):
    """Older weights count less and less.

    average = d average + (1 - d) weights, with d = min(decay, (1 + m) / (10 + m)) after m weights, or d = ``decay``
    """

    decay: Fraction = 0.999
    """What is kept of the average when weights are taken: it reaches back over 1 / (1 - decay) of them."""
    warm_start: bool = True
    """Begin with a small d, so that the weights of the start are soon forgotten; else the first weights stay in it."""

    def weight(self, taken: int) -> float:
        """See ``WeightAverage.weight``."""
        if taken == 0:
            return 1.0
        return 1 - (min(self.decay, (1 + taken) / (10 + taken)) if self.warm_start else self.decay)
