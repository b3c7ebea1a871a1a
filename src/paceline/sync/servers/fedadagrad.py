"""FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- v + update^2."""

from paceline.config import Fraction
from paceline.sync.servers.adaptive import AdaptiveOptions, AdaptiveServer


class FedAdagrad(AdaptiveOptions):
    """Rates by coordinate, from the sum of squared updates."""

    beta1: Fraction = 0.0
    """Share of the mean of the updates that is kept."""

    def build(self) -> AdaptiveServer:
        """The rule at work."""
        return AdaptiveServer(self, lambda v, square: v.add_(square))
