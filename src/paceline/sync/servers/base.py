"""What a server rule is: from the weights of a round and the clients' mean update to the weights of the next."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from paceline.sync.base import SyncState


class ServerConfig(Protocol):
    """The frozen config class of a server rule."""

    lr: float
    """The server's rate."""
    copies: ClassVar[int]
    """Tensors like each parameter that it remembers."""

    def build(self) -> "Server":
        """The rule at work."""
        ...


class Server(Protocol):
    """A server rule on one rank; it works on single values, so that how a replica is cut changes nothing."""

    def start(self, like: Mapping[str, Tensor]) -> None:
        """Make what is remembered for parameters like these."""

    def step(self, name: str, before: Tensor, update: Tensor) -> Tensor:
        """A parameter's next value. ``update``: the mean of client minus server weights, fp32 or more."""
        ...

    def state(self) -> Mapping[str, SyncState]:
        """As in ``Sync.state``."""
        ...
