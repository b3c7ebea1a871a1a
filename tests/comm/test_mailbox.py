"""Exchanges in which all send to all at once."""

import pytest
import torch

from paceline.comm import link, mailbox
from paceline.plan.wire import direct_bytes

SMALL = (1, 7, 60, 3, 50, 2, 9, 4)
"""More than wait for room."""
assert len(SMALL) > mailbox.AHEAD


def drawn(index, members):
    """What a member sends: small tensors, then some that there is no room for, or just room."""
    generator = torch.Generator().manual_seed(index)
    room = direct_bytes(members) // 8
    sizes = (*SMALL, room - 1, room, room + 1, 2 * room + 5)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]


def exchanged(member, turns):
    """Sums and gathers in turn, all on their way at once, and ended in another order by each member."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    own = drawn(member.index, member.size)
    for _ in range(turns):
        sums = [tensor.clone() for tensor in own[: len(SMALL)]]
        gathered = [tensor.new_empty(member.size, *tensor.shape) for tensor in own]
        pending = []
        for i, tensor in enumerate(own):
            pending += [between.all_reduce(sums[i])] if i < len(SMALL) else []
            pending += [between.all_gather(gathered[i], tensor)]
        for i in range(len(pending)):
            pending[(i * (1 + 2 * (member.index % 2))) % len(pending)].wait()
        pending[0].wait()  # once more, which does nothing
    waiting = [len(receives) for receives in between._mailbox._waiting.values()]
    return sums, gathered, waiting


@pytest.mark.parametrize("members", [2, 3, 4])
def test_all_get_all_and_add_in_the_order_of_members(pool, members):
    own = [drawn(index, members) for index in range(members)]
    for sums, gathered, waiting in pool.run(exchanged, members, 3):
        for i, tensors in enumerate(zip(*own, strict=True)):
            assert torch.equal(gathered[i], torch.stack(tensors))
            if i < len(SMALL):
                assert torch.equal(sums[i], sum(tensors[1:], tensors[0]))
        assert waiting == [mailbox.AHEAD] * (members - 1)
