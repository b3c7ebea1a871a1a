"""Moments of clients that go on with those of their last round: whose optimizer is not begun anew.

A client's moments are kept by every replica, for any may train it next; so after a round each is sent from the replica
where they were made, with a few words that say what they are, for an optimizer makes its state in its first step.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paceline.comm.link import Link
from paceline.comm.replica import VisitedReplica
from paceline.data.rounds import Visit

Moments = dict[str, Tensor]
"""``PARAMETER/what`` -> this rank's part."""


class ClientMoments:
    """Those of all clients that had a turn, on one rank."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.kept: dict[int, Moments] = {}
        """By client."""
        self._made: dict[int, Moments] = {}

    def start(self, replica: VisitedReplica) -> None:
        """No client has any."""
        self._device = replica.shards[0].local.device

    def enter(self, visit: Visit, replica: VisitedReplica) -> None:
        """The client goes on with its own."""
        replica.recall(self.kept.get(visit.client, {}))

    def leave(self, visit: Visit, replica: VisitedReplica) -> None:
        """Keep them until the round is over."""
        self._made[visit.place] = replica.moments()

    def close(self, visits: Sequence[Visit]) -> None:
        """Tell each other."""
        for visit in visits:
            root = visit.place % self._link.size
            self.kept[visit.client] = self._told(self._made.pop(visit.place, None), root)

    def _told(self, own: Moments | None, root: int) -> Moments:
        """The root's, whose link index is ``root``."""
        if self._link.size == 1:
            assert own is not None
            return own
        words = json.dumps(_described(own or {})).encode()
        length = torch.tensor([len(words)], dtype=torch.int64, device=self._device)
        self._link.broadcast(length, root).wait()
        header = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if own is not None:
            header.copy_(torch.frombuffer(bytearray(words), dtype=torch.uint8))
        self._link.broadcast(header, root).wait()
        if own is None:
            own = {
                name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                for name, (shape, dtype, device) in json.loads(bytes(header.tolist())).items()
            }
        sent = {name: tensor.to(self._device).contiguous().view(-1) for name, tensor in own.items()}
        for pending in [self._link.broadcast(values, root) for values in sent.values() if len(values)]:
            pending.wait()
        return {name: sent[name].view(tensor.shape).to(tensor.device) for name, tensor in own.items()}


def _described(moments: Mapping[str, Tensor]) -> dict[str, tuple[list[int], str, str]]:
    return {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type)
        for name, tensor in moments.items()
    }
