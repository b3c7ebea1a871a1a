"""What travels over a link, and that its bytes are those of the formulas."""

import os
import time
from unittest.mock import patch

import pytest
import torch

from paceline.comm import link, shared
from paceline.comm.link import LocalLink
from paceline.comm.ranks import Coordinates
from paceline.errors import LinkError
from paceline.plan.wire import all_gather_bytes, all_reduce_bytes, all_to_all_bytes, broadcast_bytes

MEMBERS = pytest.mark.parametrize("members", [2, 3, 4])


def linked(member, timeout_s=30.0, *, loopback=True):
    return link.connect(
        member.store,
        index=member.index,
        size=member.size,
        coordinate=0,
        backend="gloo",
        timeout_s=timeout_s,
        loopback=loopback,
    )


def sent(between, exchange):
    """What an exchange gives and how many bytes it sends."""
    before = between.sent_bytes
    pending, result = exchange()
    pending.wait()
    return result.tolist(), between.sent_bytes - before


def exchanges(member):
    """Every operation once, on tensors from which one sees where they come from."""
    between, n, own = linked(member), member.size, float(member.index)
    tensor = torch.arange(2 * n, dtype=torch.float32).view(n, 2) + 100 * own

    def all_reduce():
        total = tensor.clone()
        return between.all_reduce(total), total

    def broadcast():
        copy = tensor.clone()
        return between.broadcast(copy, n - 1), copy

    def all_gather():
        into = torch.empty(n, *tensor.shape)
        return between.all_gather(into, tensor), into

    def all_to_all():
        into = torch.empty_like(tensor)
        return between.all_to_all(into, tensor), into

    def reduce_scatter():
        into = torch.empty(2)
        return between.reduce_scatter(into, tensor), into

    return {f.__name__: sent(between, f) for f in (all_reduce, broadcast, all_gather, all_to_all, reduce_scatter)}


@MEMBERS
def test_every_exchange_gives_what_it_says_and_sends_what_the_formula_says(pool, members):
    told = pool.run(exchanges, members)
    tensors = torch.stack([torch.arange(2.0 * members).view(members, 2) + 100 * i for i in range(members)])
    size = 4 * 2 * members
    for index, own in enumerate(told):
        assert own["all_reduce"] == (tensors.sum(0).tolist(), all_reduce_bytes(size, members))
        place = (index - (members - 1)) % members
        assert own["broadcast"] == (tensors[-1].tolist(), broadcast_bytes(size, members, place))
        assert own["all_gather"] == (tensors.tolist(), all_gather_bytes(size, members))
        assert own["all_to_all"] == (tensors[:, index].tolist(), all_to_all_bytes(size, members))
        assert own["reduce_scatter"] == (tensors[:, index].sum(0).tolist(), all_to_all_bytes(size, members))


def test_a_broadcast_sends_every_member_one_copy():
    for size in range(1, 20):
        copies = [broadcast_bytes(1, size, place) for place in range(size)]
        assert sum(copies) == size - 1 and copies == sorted(copies, reverse=True)
    assert [broadcast_bytes(1, 7, place) for place in range(7)] == [3, 2, 1, 0, 0, 0, 0]


def rows(member):
    """Member i sends i + j rows to member j, so some get nothing from themselves."""
    between, n = linked(member), member.size
    counts = [member.index + j for j in range(n)]
    tensor = torch.full((sum(counts), 3), float(member.index))
    into = torch.empty(sum(counts), 3)  # what it sends to j is as much as what comes from j
    between.all_to_all(into, tensor, received=counts, sent=counts).wait()
    return into[:, 0].tolist(), between.sent_bytes


def test_rows_of_uneven_numbers_come_in_the_order_of_the_members(pool):
    for index, (got, sent_bytes) in enumerate(pool.run(rows, 3)):
        assert got == [float(j) for j in range(3) for _ in range(index + j)]
        assert sent_bytes == 3 * 4 * sum(index + j for j in range(3) if j != index)


def in_order(member):
    """The sum of numbers whose order of adding shows."""
    between = linked(member)
    value = [1e16, -1e16, 1.0][member.index]
    into = torch.empty(1, dtype=torch.float64)
    between.reduce_scatter(into, torch.full((3, 1), value, dtype=torch.float64)).wait()
    return into.item()


def test_owners_add_in_the_order_of_the_members(pool):
    assert pool.run(in_order, 3) == [1.0, 1.0, 1.0]


def pairs(member):
    """Both neighbours of a ring at once, under two tags; then a link of the members 2 and 0, in this order."""
    between, n = linked(member), member.size
    following, before = (member.index + 1) % n, (member.index - 1) % n
    got = [torch.empty(2), torch.empty(3)]
    started = [between.receive(got[tag], before, tag=tag) for tag in (1, 0)]
    started += [between.send(torch.full((2 + tag,), float(member.index)), following, tag=tag) for tag in (0, 1)]
    for pending in started:
        pending.wait()
    ring_bytes, total = between.sent_bytes, torch.tensor([float(member.index)])
    if member.index in (2, 0):
        among = between.sub([2, 0])
        assert (among.index, among.size) == (int(member.index == 0), 2)
        among.all_reduce(total).wait()
        again = between.sub([2, 0])
        again.broadcast(total).wait()
    return [tensor.tolist() for tensor in got], ring_bytes, total.item(), between.sent_bytes - ring_bytes


def test_two_members_and_some_of_them(pool):
    told = pool.run(pairs, 3)
    for index, (got, ring_bytes, _, _) in enumerate(told):
        before = float((index - 1) % 3)
        assert got == [[before] * 2, [before] * 3] and ring_bytes == 4 * 5
    assert [total for _, _, total, _ in told] == [2.0, 1.0, 2.0]
    assert [extra for *_, extra in told] == [all_reduce_bytes(4, 2), 0, all_reduce_bytes(4, 2) + 4]


def in_pieces(member):
    """A sum that is not cut, and one that is, the last piece of which is shorter."""
    between, sums = linked(member), []
    for most in (link._PIECE_BYTES, 100):
        with patch.object(link, "_PIECE_BYTES", most):
            total = torch.arange(1001, dtype=torch.float64).view(7, 143) * (member.index + 1)
            before = between.sent_bytes
            between.all_reduce(total).wait()
            sums.append((total, between.sent_bytes - before))
    return sums


@MEMBERS
def test_pieces_of_a_large_sum_are_the_sum_and_its_bytes(pool, members):
    expected = torch.arange(1001, dtype=torch.float64).view(7, 143) * sum(range(1, members + 1))
    for total, sent_bytes in (made for told in pool.run(in_pieces, members) for made in told):
        assert torch.equal(total, expected) and sent_bytes == all_reduce_bytes(8 * 1001, members)


NUMELS = (8_192, 100_001, 8_192, 8_192, 50_001)
"""All are large enough for shared memory; some of one size are on their way together."""


def large(member):
    """Sums of many sizes and dtypes, ended in another order by each member, again and again."""
    between, totals = linked(member), []
    assert between._shared is not None
    for turn in range(4):
        generator = torch.Generator().manual_seed(100 * turn + member.index)
        tensors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in NUMELS]
        tensors.append(tensors[0].to(torch.bfloat16).repeat(3))
        pending = [between.all_reduce(tensor) for tensor in tensors]
        for i in range(len(pending)):
            pending[(i * (1 + 4 * (member.index % 2))) % len(pending)].wait()
        pending[0].wait()  # once more, which does nothing
        totals.append(tensors)
    rooms = sum(len(rooms) for rooms in between._shared._own.values())
    return totals, between.sent_bytes, rooms


@MEMBERS
def test_large_tensors_are_summed_in_the_order_of_members_over_memory_that_is_used_again(pool, members):
    told = pool.run(large, members)
    for turn in range(4):
        drawn = [torch.Generator().manual_seed(100 * turn + index) for index in range(members)]
        for i, numel in enumerate(NUMELS):
            own = [torch.randn(numel, generator=generator, dtype=torch.float64) for generator in drawn]
            if i == 0:
                short = [tensor.to(torch.bfloat16).repeat(3) for tensor in own]
                assert all(torch.equal(totals[turn][-1], sum(short[1:], short[0])) for totals, *_ in told)
            assert all(torch.equal(totals[turn][i], sum(own[1:], own[0])) for totals, *_ in told)
    sizes = [8 * numel for numel in NUMELS] + [2 * 3 * NUMELS[0]]
    assert all(sent_bytes == 4 * sum(all_reduce_bytes(size, members) for size in sizes) for _, sent_bytes, _ in told)
    assert all(rooms <= 3 * len(sizes) for _, _, rooms in told)  # of 24: a member may be two turns ahead of a slow one


def apart(member):
    """Member 1 finds something else where another one wrote."""
    if member.index == 1:
        shared._open, before = (lambda process, fd: os.memfd_create("other")), shared._open
    try:
        between = linked(member)
    finally:
        if member.index == 1:
            shared._open = before
    total = torch.full((100_000,), float(member.index))
    between.all_reduce(total).wait()
    return between._shared is None, total[0].item(), bool((total == total[0]).all())


def test_where_one_cannot_read_the_memory_of_another_all_use_sockets(pool):
    assert pool.run(apart, 3) == [(True, 3.0, True)] * 3


def aborted(member, numel):
    """Member 0 breaks the link while the others wait for it."""
    between = linked(member, timeout_s=20.0)
    if member.size > 1:
        between.all_reduce(torch.zeros(1)).wait()
    start = time.monotonic()
    try:
        if member.index == 0:
            waiting = between.receive(torch.empty(1), 1)
            between.abort()
        else:
            waiting = between.all_reduce(torch.zeros(numel))
        waiting.wait()
    except LinkError:
        return time.monotonic() - start


@pytest.mark.parametrize("numel", [1, 100_000])
def test_an_aborted_link_fails_what_waits_for_it_at_once(pool, numel):
    assert all(seconds is not None and seconds < 10 for seconds in pool.run(aborted, 3, numel))


def test_a_link_of_one_member_gives_back_what_it_is_given():
    between, tensor, into = LocalLink(), torch.arange(6.0).view(1, 6), torch.empty(1, 6)
    for exchange in (between.all_gather, between.all_to_all, between.reduce_scatter):
        exchange(into.zero_(), tensor).wait()
        assert torch.equal(into, tensor)
    assert between.sub([0]) is between and between.sent_bytes == 0


def test_replicas_of_a_hierarchy_know_their_groups():
    """Two groups of three: neighbours agree first, then counterparts."""

    def groups(replica):
        place = Coordinates.of(replica, replicas=6, ranks=1, local_rank=0, local_ranks=1)
        return [(group.index, group.size, group.name) for group in place.groups((3, 2))]

    inner, outer = zip(*[groups(replica) for replica in range(6)], strict=True)
    assert [(index, size) for index, size, _ in inner] == [(0, 3), (1, 3), (2, 3)] * 2
    assert [(index, size) for index, size, _ in outer] == [(0, 2)] * 3 + [(1, 2)] * 3
    assert len({name for *_, name in inner[:3]}) == 1 and len({name for *_, name in inner}) == 2
    assert [name for *_, name in outer[:3]] == [name for *_, name in outer[3:]] and len({n for *_, n in outer}) == 3


def over(member, interface):
    """A sum over an interface that the environment names, or what is wrong with it."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        between = linked(member, loopback=False)
    except LinkError as error:
        return str(error)
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    total = torch.ones(1)
    between.all_reduce(total).wait()
    return total.item()


def test_links_between_machines_use_the_interface_that_the_environment_names(pool):
    assert pool.run(over, 2, "lo") == [2.0, 2.0]
    assert all("could not be formed" in told for told in pool.run(over, 2, "none7"))
