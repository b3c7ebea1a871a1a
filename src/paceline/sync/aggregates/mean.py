"""The mean over clients, by the weights that ``sync.weights`` names; or by losses, with ``sync.q``."""

from typing import ClassVar

from paceline.config import Options


class Mean(Options):
    """The mean, which a single false update can lead anywhere."""

    is_robust: ClassVar[bool] = False
