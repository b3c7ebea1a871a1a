"""Differential privacy of clients: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963), with a clip that may adapt.

    update of a client     Delta_k min(1, clip / ||Delta_k||), over all tensors together
    joint update           1/m (sum of them + N(0, (noise clip)^2)), m the clients of a round, which is fixed

With ``adaptive`` (Andrew et al. 2021, arXiv 1905.03871, algorithm 1) the clip follows a quantile of the lengths:

    b    <- 1/m (how many were within the clip + N(0, sigma_b^2))        sigma_b = m/20 unless it is said
    clip <- clip exp(-rate (b - quantile))
    noise of the update z_Delta = (noise^-2 - (2 sigma_b)^-2)^-1/2, so that both together cost what ``noise`` alone does

The noise follows from (seed, round): who knows the seed can take it away again.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from paceline.comm.replica import Shard, VisitedReplica
from paceline.config import Options, Positive, Share
from paceline.errors import MissingExtraError
from paceline.sync.aggregation import Update
from paceline.sync.base import SyncState
from paceline.sync.normal import add_normal


class AdaptiveClip(Options):
    """The clip follows a quantile of the lengths of updates."""

    quantile: Share = 0.5
    """Share of clients whose updates are to be within the clip."""
    rate: Positive = 0.2
    """How quickly it follows."""
    count_noise: Positive | None = None
    """Standard deviation of the noise on how many are within; default: a twentieth of the clients of a round."""


class PrivacyOptions(Options):
    """What nobody can tell from the weights: whether a client took part."""

    clip: Positive
    """Length to which a client's update is cut; of ``adaptive`` the first one."""
    noise: Positive
    """Noise multiplier z: the standard deviation of the noise on the sum of updates, in clips."""
    delta: Share = 1e-5
    """Probability with which epsilon may fail; well below one over the number of clients."""
    adaptive: AdaptiveClip | None = None
    """A clip that follows what clients send."""

    def count_noise(self, clients: int) -> float:
        """sigma_b."""
        assert self.adaptive is not None
        return self.adaptive.count_noise or clients / 20

    def update_noise(self, clients: int) -> float:
        """z_Delta: the multiplier of the noise on updates, for ``clients`` in a round."""
        if self.adaptive is None:
            return self.noise
        return 1.0 / math.sqrt(self.noise**-2 - (2 * self.count_noise(clients)) ** -2)

    def refused(self, clients: int) -> str | None:
        """Why it cannot be with so many clients in a round, or None."""
        if self.adaptive is None or self.noise < 2 * self.count_noise(clients):
            return None
        return (
            f"privacy.noise={self.noise:g} is spent on counting alone: it has to be below twice the noise on the "
            f"count, {2 * self.count_noise(clients):g}. Use more clients a round, or a larger count_noise"
        )

    @model_validator(mode="after")
    def _is_a_probability(self) -> Self:
        if self.delta >= 1:
            raise ValueError(f"delta={self.delta:g} promises nothing; expected less than 1, such as 1e-5")
        return self


class Privacy:
    """Clipping and noise on one rank; ``clients`` of each round. Noise follows from ``key``."""

    def __init__(self, options: PrivacyOptions, clients: int, key: int | str) -> None:
        self._options, self._clients, self._key = options, clients, key
        self._clip = torch.tensor(options.clip, dtype=torch.float64)
        self._within = 0

    @property
    def clip(self) -> float:
        """Of now."""
        return float(self._clip)

    @clip.setter
    def clip(self, clip: float) -> None:
        self._clip.fill_(clip)

    def cut(self, update: dict[str, Tensor], replica: VisitedReplica) -> bool:
        """Cut a client's update to the clip, in place; whether it was within."""
        length, clip = math.sqrt(float(replica.square_sums([update]))), self.clip
        if length > clip:
            for tensor in update.values():
                tensor.mul_(clip / length)
        return length <= clip

    def count(self, within: bool) -> None:
        """A client whose update was, or was not, within the clip."""
        self._within += within

    def told(self) -> float:
        """How many clients were within the clip, at this replica."""
        return float(self._within)

    def blur(self, update: Update, within: float, shards: Sequence[Shard], step: int) -> None:
        """Add the noise to the joint update, in place, and let the clip follow ``within`` of all replicas."""
        m, options = self._clients, self._options
        deviation = options.update_noise(m) * self.clip / m
        for shard in shards:
            add_normal(update[shard.name], shard, deviation, (self._key, "privacy", step))
        if (adaptive := options.adaptive) is not None:
            count = torch.zeros((), dtype=torch.float64)
            alone = Shard("count", torch.nn.Parameter(torch.zeros(()), requires_grad=False))
            add_normal(count, alone, options.count_noise(m), (self._key, "privacy", step))
            share = (within + float(count)) / m
            self._clip.mul_(math.exp(-adaptive.rate * (share - adaptive.quantile)))
        self._within = 0

    def state(self) -> Mapping[str, SyncState]:
        """The clip."""
        return {"privacy_clip": SyncState(self._clip)}


def check_accounting() -> None:
    """Raise ``MissingExtraError`` where what privacy costs could not be told."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise MissingExtraError(
            "sync.privacy: to tell what it costs (epsilon) takes the dp-accounting package: "
            "pip install 'paceline[privacy]'"
        )


def epsilon(options: PrivacyOptions, *, rounds: int, cohort: int, clients: int) -> float:
    """What so many rounds cost, for one client replaced by another: (epsilon, ``options.delta``)-privacy.

    A cohort has a fixed size and is drawn without replacement, which is not Poisson sampling: it is accounted by the
    Renyi bound for such samples (Wang et al. 2019, arXiv 1808.00087, theorem 27). Replacing a client changes a sum of
    clipped updates by up to two clips, so the noise is half as large in terms of that.
    """
    check_accounting()
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if rounds == 0:
        return 0.0
    noise = dp_accounting.GaussianDpEvent(options.noise / 2)
    one = dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, noise)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.SelfComposedDpEvent(one, rounds))
    spent: float = accountant.get_epsilon(options.delta)
    return spent
