"""FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- beta2 v + (1 - beta2) update^2."""

from paceline.config import Fraction
from paceline.sync.servers.adaptive import AdaptiveOptions, AdaptiveServer


class FedAdam(AdaptiveOptions):
    """Rates by coordinate, from a running mean of squared updates."""

    beta2: Fraction = 0.99
    """Share of the mean of the squares that is kept."""

    def build(self) -> AdaptiveServer:
        """The rule at work."""
        beta2 = self.beta2
        return AdaptiveServer(self, lambda v, square: v.mul_(beta2).add_(square, alpha=1 - beta2))
