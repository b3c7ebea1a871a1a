"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- v - (1 - beta2) update^2 sign(v - update^2)."""

from paceline.config import Fraction
from paceline.sync.servers.adaptive import AdaptiveOptions, AdaptiveServer


class FedYogi(AdaptiveOptions):
    """As FedAdam, with a second moment that falls slowly."""

    beta2: Fraction = 0.99
    """How slowly the second moment follows."""

    def build(self) -> AdaptiveServer:
        """The rule at work."""
        beta2 = self.beta2
        return AdaptiveServer(self, lambda v, square: v.sub_(square * (v - square).sign(), alpha=1 - beta2))
