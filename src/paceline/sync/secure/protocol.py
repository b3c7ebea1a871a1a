"""SecAgg+ (Bell et al. 2020, eprint 2020/704), which is SecAgg (Bonawitz et al. 2017) on a sparse graph of clients.

Every client has k neighbours, who are the same the other way round. It adds to its vector x_i, modulo 2^bits, a mask of
its own and one for each neighbour, which the neighbour takes off:

    y_i = x_i + stream(b_i) + sum over neighbours j > i of stream(s_ij) - sum over neighbours j < i of stream(s_ij)

    advertise   i -> server     two public keys: for s_ij, and for sealing
    share       i -> neighbours, through the server, sealed: shares of b_i and of the private key behind s_ij
    mask        i -> server     y_i
    unmask      i -> server     of each neighbour either its share of b_j (its y_j came) or of its key (it did not)

Any ``threshold`` of a client's neighbours open one of the two secrets, so clients may drop out at every stage. A client
never gives both of a neighbour. The server gets the exact sum over those whose y_i came, or, if too few are left, an
error. The server is taken to be curious but to follow the protocol: keys are not signed, and the list of
those who dropped out is not agreed on among the clients.

Nothing here sends: a stage takes messages and gives messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.data.permute import Key, Permutation
from paceline.errors import TrainError
from paceline.sync.secure.primitives import KEY_BYTES, Primitives, Words
from paceline.sync.secure.shamir import Random, reconstruct, share

_MASKS, _SEALS = b"paceline secure sum: masks", b"paceline secure sum: seals"


def graph(clients: int, degree: int, key: Key) -> list[list[int]]:
    """The neighbours of each client, ascending: a ring in a permuted order, each joined to the nearest on both sides.

    ``degree`` is even and below the number of clients, or one below it, when all are joined.
    """
    if degree >= clients - 1:
        return [[j for j in range(clients) if j != i] for i in range(clients)]
    assert degree % 2 == 0 and degree > 0, degree
    order = Permutation(clients, key)(np.arange(clients)).tolist()
    neighbours: list[list[int]] = [[] for _ in range(clients)]
    for place, client in enumerate(order):
        for away in range(1, degree // 2 + 1):
            neighbours[client] += [order[(place + away) % clients], order[place - away]]
    return [sorted(own) for own in neighbours]


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """What a client advertises."""

    masks: bytes
    seals: bytes


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a client gives away at the end: its shares of neighbours' secrets, by neighbour."""

    own_masks: Mapping[int, bytes]
    """Of b_j, of those whose vector came."""
    keys: Mapping[int, bytes]
    """Of the private keys of those whose vector did not."""


class Client:
    """One client; clients are numbered from 0. ``bits`` of the modulus, 32 at most."""

    def __init__(
        self, index: int, neighbours: Sequence[int], threshold: int, primitives: Primitives, random: Random, bits: int
    ) -> None:
        self.index, self._neighbours, self._threshold = index, set(neighbours), threshold
        self._primitives, self._random = primitives, random
        self._word = np.uint32((1 << bits) - 1)
        self._key, masks = primitives.key_pair(random)
        self._seal_key, seals = primitives.key_pair(random)
        self._own_seed = random(KEY_BYTES)
        self.public = PublicKeys(masks=masks, seals=seals)
        self._others: dict[int, PublicKeys] = {}
        self._paired: set[int] = set()
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._has_opened = False

    def share(self, public: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        """From the keys of those who advertised to a sealed message for each neighbour among them."""
        self._others = {j: keys for j, keys in public.items() if j in self._neighbours}
        self._enough(len(self._others), "advertised keys")
        places = [j + 1 for j in self._others]
        keys = share(self._key, places, self._threshold, self._random)
        own = share(self._own_seed, places, self._threshold, self._random)
        return {
            j: self._primitives.seal(self._seal(j), int(self.index > j), own[j + 1] + keys[j + 1]) for j in self._others
        }

    def mask(self, sealed: Mapping[int, bytes], vector: Words, nonce: int = 0) -> Words:
        """From the messages of neighbours to the masked vector; ``nonce`` tells several vectors of a client apart."""
        self.receive(sealed)
        masked = vector + self._primitives.stream(self._own_seed, nonce, len(vector))
        for j in sorted(self._paired):
            masked += pair_mask(self._primitives, self._key, self._others[j].masks, self.index, j, nonce, len(vector))
        return masked & self._word

    def receive(self, sealed: Mapping[int, bytes]) -> None:
        """Open what neighbours sent; from now on they are those with whom this client is paired."""
        if self._held:
            assert self._paired == sealed.keys(), "a client pairs once"
            return
        self._paired = set(sealed) & self._others.keys()
        self._enough(len(self._paired), "sent shares")
        for j in self._paired:
            both = self._primitives.open(self._seal(j), int(j > self.index), sealed[j])
            self._held[j] = both[: len(both) // 2], both[len(both) // 2 :]

    def unmask(self, came: Sequence[int]) -> Opened:
        """From the clients whose vectors came to the shares that open the sum; once only.

        ``TrainError`` if so few neighbours are left that the server could be after a single vector.
        """
        assert not self._has_opened, "a client opens one sum of a round"
        self._has_opened = True
        left = self._paired & set(came)
        self._enough(len(left), "handed in their vectors")
        return Opened(
            own_masks={j: self._held[j][0] for j in sorted(left)},
            keys={j: self._held[j][1] for j in sorted(self._paired - left)},
        )

    def _seal(self, other: int) -> bytes:
        return self._primitives.agree(self._seal_key, self._others[other].seals, _SEALS)

    def _enough(self, count: int, what: str) -> None:
        if count < self._threshold:
            raise TrainError(
                f"secure aggregation: only {count} neighbours of client {self.index} {what}, and {self._threshold} are "
                "needed. Use more neighbours (sync.secure.neighbours), or a lower sync.secure.threshold"
            )


def pair_mask(
    primitives: Primitives, private: bytes, public: bytes, own: int, other: int, nonce: int, count: int
) -> Words:
    """What ``own`` adds for ``other``: the stream of their common key, or its negative."""
    words = primitives.stream(primitives.agree(private, public, _MASKS), nonce, count)
    return words if other > own else np.negative(words)


class Opening:
    """The server's last stage: from the clients' shares to what has to be taken off the sum of masked vectors.

    ``paired``: with whom each client paired, by client; ``came``: whose vectors are in the sum. Raises ``TrainError``
    if there are not enough shares of some secret.
    """

    def __init__(
        self,
        public: Mapping[int, PublicKeys],
        paired: Mapping[int, Sequence[int]],
        came: Sequence[int],
        opened: Mapping[int, Opened],
        threshold: int,
        primitives: Primitives,
    ) -> None:
        self._public, self._primitives = public, primitives
        self._came = sorted(came)
        dropped = sorted({j for i in came for j in paired[i]} - set(came))
        self._seeds = {
            i: _open(i, {k: told.own_masks for k, told in opened.items()}, threshold, "the own mask")
            for i in self._came
        }
        keys = {j: _open(j, {k: told.keys for k, told in opened.items()}, threshold, "the key") for j in dropped}
        self._left = [(i, j, keys[j]) for j in dropped for i in self._came if j in paired[i]]

    def masks(self, count: int, nonce: int = 0) -> Words:
        """What masks add up to in the sum of vectors of ``count`` words."""
        total = np.zeros(count, np.uint32)
        for seed in self._seeds.values():
            total += self._primitives.stream(seed, nonce, count)
        for i, j, key in self._left:
            # What i added for j: the negative of what j, which never came, would have added for i.
            total -= pair_mask(self._primitives, key, self._public[i].masks, j, i, nonce, count)
        return total


def _open(client: int, shares: Mapping[int, Mapping[int, bytes]], threshold: int, what: str) -> bytes:
    own = {holder + 1: told[client] for holder, told in shares.items() if client in told}
    if len(own) < threshold:
        raise TrainError(
            f"secure aggregation: {len(own)} shares of {what} of client {client} came, and {threshold} are needed; the "
            "sum stays closed. Use more neighbours (sync.secure.neighbours), or a lower sync.secure.threshold"
        )
    return reconstruct(own, threshold)
