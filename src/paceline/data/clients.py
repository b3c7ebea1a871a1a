"""Which documents are whose in a federated run, and the rows of each client.

    natural      all documents of one label (a file, a source, what a column says) are of one client; with fewer clients
                 than labels, labels are dealt out, the largest first to the client with the fewest documents so far
    dirichlet    for each label, shares of the clients are drawn from Dir(alpha, ..., alpha), and its documents, in a
                 permuted order, are cut by them (Hsu et al. 2019, arXiv 1909.06335)

Every document is of exactly one client. Who owns what follows from the seed and the data alone.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from paceline.config import ClientsConfig
from paceline.data.order import shuffled
from paceline.data.permute import Permutation
from paceline.data.rows import Ints
from paceline.data.tokens import TokenSet
from paceline.errors import DataError

_LEAST_DRAWS, _MOST_DRAWS, _MOST_SHARES = 10, 1000, 2**28
"""After so many draws, or so many shares in them (some ten seconds), that every client has its least number of
documents is not to be hoped for."""
_AT_ONCE = 2**22
"""Shares that are in memory at a time."""


def owners(token_sets: Sequence[TokenSet], config: ClientsConfig, seed: int) -> tuple[list[Ints], int]:
    """The client (D,) of each document of each source, and how many clients there are.

    Raises ``DataError`` for more clients than the data has labels or documents for.
    """
    labels = _labels(token_sets, config.label)
    assigned = _natural(labels, config) if config.by == "natural" else _dirichlet(labels, config, seed)
    bounds = np.cumsum([len(token_set) for token_set in token_sets])[:-1]
    return np.split(assigned, bounds), config.count or int(labels.max()) + 1


def _labels(token_sets: Sequence[TokenSet], label: str) -> Ints:
    """The label (D,) of all documents, from 0 without gaps."""
    source = np.concatenate([np.full(len(own), index) for index, own in enumerate(token_sets)])
    if label == "source":
        told = source[None]
    elif label == "file":
        told = np.stack([source, np.concatenate([np.asarray(own.files, np.int64) for own in token_sets])])
    else:
        told = np.concatenate([own.labels for own in token_sets if own.labels is not None])[None]
    return np.unique(told, axis=1, return_inverse=True)[1].reshape(-1)


def _natural(labels: Ints, config: ClientsConfig) -> Ints:
    sizes = np.bincount(labels)
    count = config.count or len(sizes)
    if count > len(sizes):
        raise DataError(
            f"data.clients.count={count} is more than the {len(sizes)} labels of the data (label: {config.label}). Use "
            f"{len(sizes)} or fewer, or by=dirichlet, which divides labels"
        )
    client_of = np.arange(len(sizes))
    if count < len(sizes):
        held = np.zeros(count, np.int64)
        for label in np.argsort(-sizes, kind="stable"):
            client_of[label] = np.argmin(held)
            held[client_of[label]] += sizes[label]
    return client_of[labels]


def _dirichlet(labels: Ints, config: ClientsConfig, seed: int) -> Ints:
    count = config.count
    assert count is not None
    if count * config.least > len(labels):
        raise DataError(
            f"data.clients: {count} clients of {config.least} documents or more need {count * config.least} documents, "
            f"and the data has {len(labels)}. Use fewer clients, or data.document=paragraph for smaller documents"
        )
    sizes = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    begins = np.cumsum(sizes) - sizes
    for label in np.flatnonzero(sizes > 1):
        own = order[begins[label] : begins[label] + sizes[label]]
        own[:] = own[Permutation(len(own), (seed, "clients", int(label)))(np.arange(len(own)))]
    draws = min(_MOST_DRAWS, max(_LEAST_DRAWS, _MOST_SHARES // (count * len(sizes))))
    for draw in range(draws):
        assigned = _cut(sizes, count, config.alpha, np.random.default_rng([seed, draw]))
        if np.bincount(assigned, minlength=count).min() >= config.least:
            return assigned[np.argsort(order)]
    raise DataError(
        f"data.clients: in {draws} draws with alpha={config.alpha:g} some of {count} clients had fewer than "
        f"{config.least} of {len(labels)} documents. Use a larger alpha, fewer clients or a smaller least"
    )


def _cut(sizes: Ints, count: int, alpha: float, rng: np.random.Generator) -> Ints:
    """The client (D,) of each document, label by label: of a label of n documents the one at (i + u) / n of the shares.

    u is drawn for each label. So a label's few documents, or its only one, go to a client with the chance of its share.
    """
    assigned = []
    at_once = max(1, _AT_ONCE // count)
    for first in range(0, len(sizes), at_once):
        own = sizes[first : first + at_once]
        ends = np.cumsum(rng.dirichlet(np.full(count, alpha), size=len(own)), axis=1)
        ends[:, -1] = 1.0
        label = np.repeat(np.arange(len(own)), own)
        place = np.arange(len(label)) - np.repeat(np.cumsum(own) - own, own)
        share = (place + rng.random(len(own))[label]) / own[label]
        found = np.searchsorted((ends + np.arange(len(own))[:, None]).ravel(), label + share)
        assigned.append((found - label * count).clip(0, count - 1))
    return np.concatenate(assigned)


class Clients:
    """The rows of every client that has any, each client's permuted anew in each of its epochs.

    ``owners``: the client (rows,) of each row of each source. ``first``: the number of the first client in the run,
    where its others are elsewhere.
    """

    def __init__(self, owners: Sequence[Ints], count: int, seed: int, first: int = 0) -> None:
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        self._sources = np.concatenate([np.full(len(own), i) for i, own in enumerate(owners)])[order]
        self._rows = np.concatenate([np.arange(len(own)) for own in owners])[order]
        sizes = np.bincount(owner, minlength=count)
        begins = np.cumsum(sizes) - sizes
        self.lengths: Ints = sizes[sizes > 0]
        """(clients,) rows of each."""
        self._begins = begins[sizes > 0]
        self._seed, self._first = seed, first
        self.left_out = int((sizes == 0).sum())
        """Clients whose documents do not fill a single row."""
        self.fingerprint = hashlib.blake2b(owner.astype("<i8").tobytes(), digest_size=8).hexdigest()
        """Of who owns what."""

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.lengths)

    def draw(self, client: int, first: int, count: int) -> tuple[Ints, Ints]:
        """Source (count,) and row within it (count,) of a client's samples ``first`` to ``first + count - 1``."""
        places = shuffled(
            np.arange(first, first + count),
            int(self.lengths[client - self._first]),
            (self._seed, "train", "client", client),
        )
        places += self._begins[client - self._first]
        return self._sources[places], self._rows[places]
