"""Secure aggregation: exact whoever drops out when, closed when too few are left, and within a federated run."""

import hashlib
import importlib.util
import itertools

import numpy as np
import pytest
import torch

import loops
from federation import federated
from loops import distance
from paceline.errors import ConfigError, MissingExtraError, TrainError
from paceline.sync.secure import mean as secure_mean
from paceline.sync.secure.fixed_point import FixedPoint
from paceline.sync.secure.primitives import Cryptography, derive
from paceline.sync.secure.protocol import Client, Opening, graph
from paceline.sync.secure.shamir import reconstruct, share
from paceline.train.clients import check_extras
from rfc import PlainPython, chacha20, x25519

ALL = [PlainPython()]
if importlib.util.find_spec("cryptography") is not None:
    ALL.append(Cryptography())  # the extra: pip install 'paceline[privacy]'
HEX = bytes.fromhex


class Quick(PlainPython):
    """Other keys and streams, to the protocol the same, which are quicker in Python."""

    def key_pair(self, random):
        private = random(32)
        return private, pow(3, int.from_bytes(private), 2**127 - 1).to_bytes(32)

    def agree(self, private, public, purpose):
        return derive(pow(int.from_bytes(public), int.from_bytes(private), 2**127 - 1).to_bytes(32), purpose)

    def stream(self, key, nonce, count):
        return np.frombuffer(hashlib.shake_256(key + bytes([nonce])).digest(4 * count), "<u4").astype(np.uint32)


QUICK = Quick()


def randoms(name):
    calls = itertools.count()
    return lambda count: hashlib.shake_256(f"{name}/{next(calls)}".encode()).digest(count)


def test_the_plain_primitives_are_those_of_the_documents():
    """RFC 7748 section 6.1, RFC 8439 section 2.3.2, RFC 5869 test case 3."""
    alice = HEX("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = HEX("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    nine = (9).to_bytes(32, "little")
    assert x25519(alice, nine) == HEX("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    shared = HEX("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert x25519(alice, x25519(bob, nine)) == x25519(bob, x25519(alice, nine)) == shared
    words = chacha20(bytes(range(32)), 1, HEX("000000090000004a00000000"), 16)
    assert words[:4].tolist() == [0xE4E7F110, 0x15593BD1, 0x1FDD0F50, 0xC47120A3]
    assert words[-1] == 0x4E3C50A2
    assert derive(HEX("0b" * 22), b"") == HEX("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")


@pytest.mark.parametrize("used", ALL[1:])
def test_the_package_gives_the_same(used):
    """Keys and streams of both, so that clients of either kind understand each other."""
    plain, key = ALL[0], bytes(range(32))
    (private, public), (other, other_public) = plain.key_pair(randoms("a")), used.key_pair(randoms("b"))
    assert used.key_pair(randoms("a")) == (private, public)
    assert used.agree(private, other_public, b"x") == plain.agree(other, public, b"x")
    assert np.array_equal(used.stream(key, 5, 37), plain.stream(key, 5, 37))


@pytest.mark.parametrize("used", ALL)
def test_a_seal_is_opened_by_its_key_alone(used):
    key = bytes(range(32))
    sealed = used.seal(key, 1, b"two shares")
    assert used.open(key, 1, sealed) == b"two shares" and b"shares" not in sealed
    for wrong in ((bytes(32), 1, sealed), (key, 0, sealed), (key, 1, bytes([sealed[0] ^ 1]) + sealed[1:])):
        with pytest.raises(ValueError, match="changed on the way"):
            used.open(*wrong)


def test_any_threshold_of_the_shares_give_the_secret_and_fewer_do_not():
    secret = hashlib.sha256(b"secret").digest()
    shares = share(secret, [1, 2, 5, 7, 9], 3, randoms("s"))
    for some in itertools.combinations(shares, 3):
        assert reconstruct({place: shares[place] for place in some}, 3) == secret
    assert reconstruct(shares, 3) == secret
    wrong = dict(itertools.islice(shares.items(), 2)) | {3: shares[5]}
    with pytest.raises(ValueError, match="not of one secret"):
        reconstruct(wrong, 3)
    # of two shares every secret is as likely: some third share makes it of any other one
    other = share(bytes(32), [1, 2, 5], 3, randoms("t"))
    assert all(len(value) == 66 for value in shares.values()) and other[1] != shares[1]


@pytest.mark.parametrize(("clients", "degree"), [(5, 4), (9, 4), (30, 6), (4, 8)])
def test_neighbours_are_mutual_and_as_many_as_asked(clients, degree):
    neighbours = graph(clients, degree, (1, "g"))
    assert all(len(set(own)) == min(degree, clients - 1) for own in neighbours)
    assert all(i in neighbours[j] and i != j for i, own in enumerate(neighbours) for j in own)
    assert clients <= degree + 1 or neighbours != graph(clients, degree, (2, "g"))


def aggregated(vectors, *, degree, threshold, bits=32, used=QUICK, lost=((), (), (), ())):
    """The opened sum where ``lost[s]`` are gone from stage s on: before advertising, sharing, masking, unmasking."""
    n, gone = len(vectors), [set(itertools.chain(*lost[: stage + 1])) for stage in range(4)]
    neighbours = graph(n, degree, (0, "test"))
    clients = [Client(i, neighbours[i], threshold, used, randoms(i), bits) for i in range(n)]
    public = {i: clients[i].public for i in range(n) if i not in gone[0]}
    sealed = {i: clients[i].share(public) for i in public if i not in gone[1]}
    inbox = {j: {i: sealed[i][j] for i in sealed if j in sealed[i]} for j in sealed}
    masked = {i: clients[i].mask(inbox[i], vectors[i]) for i in sealed if i not in gone[2]}
    opened = {i: clients[i].unmask(list(masked)) for i in masked if i not in gone[3]}
    paired = {i: sorted(inbox[i]) for i in masked}
    opening = Opening(public, paired, list(masked), opened, threshold, used)
    mask = np.uint32((1 << bits) - 1)
    total = sum(masked.values(), np.zeros(len(vectors[0]), np.uint32))
    expected = sum((vectors[i] for i in masked), np.zeros(len(vectors[0]), np.uint32))
    return (total - opening.masks(len(vectors[0]))) & mask, expected & mask, masked


def vectors(n, bits, length=11):
    return [np.random.default_rng(i).integers(0, 1 << bits, length, np.uint32) for i in range(n)]


@pytest.mark.parametrize("used", ALL)
@pytest.mark.parametrize("bits", [32, 20])
def test_the_sum_is_exact_and_no_vector_is_seen(used, bits):
    own = vectors(6, bits)
    total, expected, masked = aggregated(own, degree=4, threshold=3, bits=bits, used=used)
    assert np.array_equal(total, expected)
    assert all((masked[i] != own[i]).sum() > 8 for i in range(6))


def test_it_is_exact_for_every_set_of_clients_lost_at_every_stage():
    """All pairs of five clients with four neighbours each, of which three open a secret."""
    own = vectors(5, 32, 3)
    for stages in itertools.product(range(5), repeat=2):
        for pair in itertools.islice(itertools.combinations(range(5), 2), 3):
            lost = [[], [], [], []]
            for client, stage in zip(pair, stages, strict=True):
                if stage < 4:
                    lost[stage].append(client)
            if sum(stage < 4 for stage in stages) > 1:
                with pytest.raises(TrainError, match="secure aggregation"):
                    aggregated(own, degree=4, threshold=3, lost=lost)
                continue
            total, expected, _ = aggregated(own, degree=4, threshold=3, lost=lost)
            assert np.array_equal(total, expected), (pair, stages)


def test_on_a_sparse_graph_some_may_be_lost_at_each_stage():
    own = vectors(16, 32, 5)
    total, expected, masked = aggregated(own, degree=8, threshold=5, lost=([3], [8], [12], [0]))
    assert np.array_equal(total, expected) and sorted({*range(16)} - set(masked)) == [3, 8, 12]


def test_too_few_are_left_and_the_sum_stays_closed():
    own = vectors(6, 32, 3)
    for lost in (([0, 1, 2], [], [], []), ([], [0, 1, 2], [], []), ([], [], [0, 1, 2], []), ([], [], [], [0, 1, 2, 3])):
        with pytest.raises(TrainError, match="secure aggregation"):
            aggregated(own, degree=5, threshold=4, lost=lost)


def test_a_client_gives_one_secret_of_each_neighbour_and_once():
    neighbours = graph(5, 4, (0, "test"))
    clients = [Client(i, neighbours[i], 3, QUICK, randoms(i), 32) for i in range(5)]
    public = {i: clients[i].public for i in range(5)}
    sealed = {i: clients[i].share(public) for i in range(5)}
    clients[0].receive({i: sealed[i][0] for i in range(1, 5)})
    told = clients[0].unmask([0, 1, 2, 3])
    assert sorted(told.own_masks) == [1, 2, 3] and sorted(told.keys) == [4]
    with pytest.raises(AssertionError, match="one sum"):
        clients[0].unmask([0, 4])


@pytest.mark.parametrize(("bits", "clients"), [(32, 3), (16, 10)])
def test_a_sum_of_codes_is_the_sum_of_numbers(bits, clients):
    code = FixedPoint(bits=bits, most=2.0, clients=clients)
    values = np.random.default_rng(0).uniform(-3, 3, (clients, 50))
    values[:, 0], values[:, 1] = 9.0, -9.0
    total = sum((code.encode(own) for own in values), np.zeros(50, np.uint32))
    error = np.abs(code.decode(total) - values.clip(-2, 2).sum(0)).max()
    assert error <= clients / 2 / code.steps
    with pytest.raises(ValueError, match="not finite"):
        code.encode(np.array([np.nan]))


def on_ranks(member, runs):
    """With the plain primitives, whose results are the same."""
    secure_mean.primitives = Quick
    return loops.on_ranks(member, runs)


SECURE = {"weights": "uniform", "secure": {}, "clients_per_round": 3}


def test_a_secure_run_is_the_plain_one_but_for_rounding(pool, tmp_path):
    """Also where clients are late, over replicas and layouts."""
    late = {"over_selection": 0.3, "speed_spread": 0.5}
    for replicas, layout in ((1, {}), (2, {}), (1, {"tensor": 2})):
        folder = tmp_path / f"{replicas}-{len(layout)}"
        options = {"replicas": replicas, "layout": layout, **late}
        plain = federated(folder=str(folder / "plain"), **options, weights="uniform")
        secure = federated(folder=str(folder / "secure"), **options, **SECURE)
        told = pool.run(on_ranks, loops.ranks(plain), [(plain, 2), (secure, 2)], timeout_s=120.0)
        one, other = (loops._joined([rank[i] for rank in told], run) for i, run in enumerate((plain, secure)))
        # two rounds, each to half a code of a client: 4 clients that were asked share 2^31 codes
        step = 4 * 1.0 / 2**31
        for name, weights in one.weights[0].items():
            assert (weights - other.weights[0][name]).abs().max() < 20 * step, name
        assert 0.0 < distance(one.weights[0], other.weights[0]) < 1e-7
        assert all(torch.equal(other.weights[0][n], w[n]) for w in other.weights for n in w)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregate": "median"}, "which secure hides"),
        ({"weights": "targets"}, "needs weights=uniform, not targets"),
        ({"q": 1.0}, "q with secure is not built"),
        ({"scaffold": True}, "scaffold with secure is not built"),
        ({"buffer": {"updates": 3}, "speed_spread": 1.0}, "buffer with secure is not built"),
        ({"clients_per_round": 2}, "Use 3 or more"),
        ({"secure": {"threshold": 1}}, "Use 2 to 2"),
        ({"over_selection": 0.5, "speed_spread": 1.0}, "Use a smaller over_selection"),
        ({"secure": {"neighbours": 3}}, "is odd"),
        ({"secure": {"bits": 40}}, "less than or equal to 32"),
    ],
)
def test_what_a_hidden_sum_does_not_go_with_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        federated(**{**SECURE, **options})


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[privacy\]'"):
        check_extras(federated(**SECURE))
