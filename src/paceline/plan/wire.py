"""Payload bytes that one member of a group sends in an exchange, and how often it waits: the closed formulas of plans.

``n_bytes`` is the size of a member's own tensor, unless said otherwise. What TCP adds (headers, acknowledgements: about
1 % with jumbo frames) is not payload.
"""


def all_reduce_bytes(n_bytes: int, size: int) -> int:
    """A sum over ``size`` members by a ring, which is optimal (Patarasuk & Yuan 2009); of a small tensor directly."""
    if n_bytes <= direct_bytes(size):
        return (size - 1) * n_bytes
    return 2 * (size - 1) * n_bytes // size


def direct_bytes(size: int) -> int:
    """The largest tensor that each member sends to all others for a sum: one delay, where a ring has many.

    As much as this sends 32 KiB more than a ring would, 3 ms at 100 Mbit/s; between two members it is no more, and the
    bound is the memory that is kept free for what comes in.
    """
    return 2**20 if size <= 2 else max(64, 2**15 * size // ((size - 1) * (size - 2)))


def all_gather_bytes(n_bytes: int, size: int) -> int:
    """Every member's tensor to all: each piece goes round the ring, or from its owner to each."""
    return (size - 1) * n_bytes


def all_to_all_bytes(n_bytes: int, size: int) -> int:
    """Equal pieces of a tensor to each member, one of which stays; a sum to the owners of pieces sends the same."""
    return (size - 1) * n_bytes // size


def broadcast_bytes(n_bytes: int, size: int, place: int) -> int:
    """A copy down a binomial tree, by the member ``place`` places after the root.

    In round i the first 2^i members that have the tensor each send it 2^i places further.
    """
    rounds = range((size - 1).bit_length())
    return n_bytes * sum(1 for i in rounds if place < 2**i and place + 2**i < size)


# For how many delays of the link, one after the other, a member waits in an exchange (``plan.network``). Gloo sends
# nothing before it has heard that the other side is ready: a delay there, and one back. ``comm/mailbox.py`` is ready
# ahead.


def all_reduce_delays(n_bytes: int, size: int) -> int:
    """A small sum goes to all at once; of a large one each piece goes round the ring twice, less one place each."""
    if n_bytes <= direct_bytes(size):
        return int(size > 1)
    return 4 * (size - 1)


def all_gather_delays(size: int) -> int:
    """To all at once."""
    return int(size > 1)


def all_to_all_delays(size: int) -> int:
    """All pieces are on their way at once; so they are in a sum to the owners of pieces."""
    return 2 * int(size > 1)


def broadcast_delays(size: int) -> int:
    """A copy goes down a binomial tree; so long waits who is last."""
    return 2 * (size - 1).bit_length()


MESSAGE_DELAYS = 2
"""A message to one member; also a question and its answer."""
