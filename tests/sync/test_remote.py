"""A round at the server, by what its clients say; who is let in; and what is taken from strangers."""

import itertools
import json
import random
import socket

import numpy as np
import pytest
import torch

from paceline.data.rounds import Rounds, Rules
from paceline.errors import ConfigError, TrainError
from paceline.sync.remote.check import problem_of
from paceline.sync.remote.gathering import OVER, Gathering, public_keys
from paceline.sync.remote.hub import NoMemories, address
from paceline.sync.remote.keys import read_tokens, write_keys
from paceline.sync.remote.shelf import Shelf
from paceline.sync.secure.mean import SecureOptions, as_masked, code, neighbours_of, stream
from paceline.sync.secure.primitives import primitives
from paceline.sync.secure.protocol import Client
from paceline.sync.server import messages as m
from paceline.sync.server.wire import Inbox, frame, read_frame

NUMEL = 7


def asked(step=1, clients=5, over=0.5):
    rules = Rules(clients=clients, sequences=2, local_steps=1, over_selection=over)
    return Rounds(np.full(12, 9, np.int64), rules, 0).asked(step)


def gathering(folder, secure=None, needed=5, step=1):
    return Gathering(step, asked(step), needed=needed, secure=secure, seed=0, shelf=Shelf(folder, step))


def hand_in(client, step=1):
    return m.HandIn(step, (4.0, 8.0, 4.0, 2.0, 1.0), {"w": torch.full((NUMEL,), float(client))})


def test_a_round_is_made_of_the_first_that_come_whatever_their_order(tmp_path):
    """In the order in which they were drawn; a second message, and one from elsewhere, change nothing."""
    clients = [visit.client for visit in asked()]
    assert len(clients) == 8
    for i, order in enumerate(itertools.islice(itertools.permutations(clients, 5), 0, 6000, 997)):
        own = gathering(tmp_path / str(i))
        outsider = next(client for client in range(12) if client not in clients)
        for client in (*order[:4], order[0], outsider):
            own.receive(client, hand_in(client))
            assert own.answer(client, hand_in(client)) == (m.Done(OVER) if client == outsider else m.Done())
        assert not own.is_over and own.wants(order[4]) and not own.wants(order[0])
        own.receive(order[4], hand_in(order[4]))
        assert own.is_over
        late = next(client for client in clients if client not in order)
        own.receive(late, hand_in(late))
        assert own.answer(late, hand_in(late)) == m.Done(OVER)
        whole, learned = own.result()
        assert [visit.client for visit in whole.visits] == [client for client in clients if client in order]
        assert [visit.place for visit in whole.visits] == list(range(5))
        assert all(float(one.update["w"][0]) == visit.client for visit, one in learned)
        assert set(whole.late) == set(clients) - set(order)


def test_what_came_outlives_the_server(tmp_path):
    """Also a decision about who was in, against what comes later; and older rounds are cleared away."""
    clients = [visit.client for visit in asked()]
    before = gathering(tmp_path)
    for client in clients[:3]:
        before.receive(client, hand_in(client))
    after = gathering(tmp_path)
    assert after.missing == sorted(clients[3:])
    after.advance(is_late=True)
    assert after.is_over
    again = gathering(tmp_path)
    again.receive(clients[4], hand_in(clients[4]))
    assert {visit.client for visit in again.result()[0].visits} == set(clients[:3])
    gathering(tmp_path, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000002"]


def test_a_file_that_was_cut_off_counts_for_nothing(tmp_path):
    client = asked()[0].client
    own = gathering(tmp_path)
    own.receive(client, hand_in(client))
    (path,) = tmp_path.glob("round-*/update/*.bin")
    path.rename(path.with_suffix(".tmp"))
    assert client in gathering(tmp_path).missing


class Masked:
    """A client of a secure round."""

    def __init__(self, number, own, options, vector):
        n = len(own.clients)
        place = own.place(number)
        neighbours = neighbours_of(options, n, 0, own.step)[place]
        drawn = stream(f"secret of {number}".encode())
        self.client = Client(place, neighbours, options.opens(n), primitives(), drawn, options.bits)
        self.number, self.neighbours, self.options, self.n, self.vector = number, neighbours, options, n, vector

    def advertise(self):
        return m.Advertise(1, self.client.public.masks.hex(), self.client.public.seals.hex())

    def share(self, keys):
        known = {place: public_keys(both) for place, both in keys.keys.items() if place in self.neighbours}
        return m.Share(1, {place: word.hex() for place, word in self.client.share(known).items()})

    def hand_in(self, shares):
        sealed = {place: bytes.fromhex(word) for place, word in shares.sealed.items()}
        return m.HandIn(1, (4.0, 8.0, 4.0, 2.0, 1.0), dict(as_masked(self.client.mask(sealed, self.codes()))))

    def codes(self):
        return code(self.options, self.n).encode(self.vector)

    def open(self, came):
        opened = self.client.unmask(came.payload)
        words = [{place: share.hex() for place, share in each.items()} for each in (opened.own_masks, opened.keys)]
        return m.Open(1, *words)


@pytest.mark.parametrize("neighbours", [None, 6])
@pytest.mark.parametrize("gone", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 2, 0)])
def test_masked_updates_open_to_their_sum_whoever_dies(gone, neighbours, tmp_path):
    """Some never come to each stage; the server dies before every message that it takes."""
    options = SecureOptions(neighbours=neighbours, threshold=4)
    rng = np.random.default_rng(0)

    def server():
        return gathering(tmp_path, options, needed=8)

    there = [Masked(visit.client, server(), options, rng.uniform(-1, 1, NUMEL)) for visit in asked()]
    random.Random(0).shuffle(there)
    said = {each.number: each.advertise() for each in there}
    for stage, (step, dead) in enumerate(zip((Masked.share, Masked.hand_in, None, Masked.open), gone, strict=True)):
        there = there[dead:]
        for each in there:
            assert server().wants(each.number)
            server().receive(each.number, said[each.number])
        if stage == 2:
            server().advance(is_late=True)
            said = {each.number: m.Came(1) for each in there}
        elif dead or sum(gone[:stage]):
            server().advance(is_late=True)
        if stage == 3:
            break
        answers = {each.number: server().answer(each.number, said[each.number]) for each in there}
        if stage == 2:
            came, step = there, Masked.open
        assert step is not None
        said = {each.number: step(each, answers[each.number]) for each in there}
    whole, learned = server().result()
    assert sorted(visit.client for visit in whole.visits) == sorted(each.number for each in came)
    total = sum(one.update["masked"].numpy().view(np.uint32).astype(np.uint64) for _, one in learned)
    total = (total % 2**32).astype(np.uint32) - server().opening().masks(NUMEL)
    assert np.array_equal(total, sum(each.codes() for each in came).astype(np.uint32))
    decoded = code(options, 8).decode(total)
    assert np.allclose(decoded, sum(each.vector for each in came), atol=1e-7)


def test_too_few_for_a_sum_to_be_opened_are_waited_for(tmp_path):
    options = SecureOptions(threshold=5)
    own = gathering(tmp_path, options, needed=8)
    there = [Masked(visit.client, own, options, np.zeros(NUMEL)) for visit in asked()]
    for each in there[:5]:
        own.receive(each.number, each.advertise())
    own.advance(is_late=True)
    assert own.stage == "advertise"
    own.receive(there[5].number, there[5].advertise())
    own.advance(is_late=True)
    assert own.stage == "share"


def test_shares_that_are_of_no_secret_are_an_error_for_the_user(tmp_path):
    options = SecureOptions()
    own = gathering(tmp_path, options, needed=8)
    there = [Masked(client, own, options, np.zeros(NUMEL)) for client in own.clients]
    said = [each.advertise() for each in there]
    for step in (Masked.share, Masked.hand_in, Masked.open):
        for each, message in zip(there, said, strict=True):
            own.receive(each.number, message)
        asking = [m.Came(1)] * 8 if step is Masked.open else said
        answers = [own.answer(each.number, message) for each, message in zip(there, asking, strict=True)]
        said = [step(each, answer) for each, answer in zip(there, answers, strict=True)]
    false = m.Open(1, dict.fromkeys(said[0].masks, "ff" * 66), {})
    for each, message in zip(there, [false, *said[1:]], strict=True):
        own.receive(each.number, message)
    with pytest.raises(TrainError, match="some client does not follow"):
        own.opening()


def test_tokens_admit_their_own_name_only(tmp_path):
    write_keys(tmp_path, host="127.0.0.1", clients=["a", "b"])
    tokens = read_tokens(tmp_path / "server/clients.txt")
    token = {name: (tmp_path / name / "token.txt").read_text().split()[1] for name in "ab"}
    assert tokens.names == ["a", "b"]
    assert tokens.admits("a", token["a"]) and tokens.admits("b", token["b"])
    assert not any(tokens.admits(*pair) for pair in (("a", token["b"]), ("c", token["a"]), ("a", ""), ("", "")))
    assert token["a"] not in (tmp_path / "server/clients.txt").read_text()
    assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.glob("*/token.txt"))
    assert (tmp_path / "server/key.pem").stat().st_mode & 0o77 == 0
    write_keys(tmp_path, host=None, clients=["c"])
    names = tmp_path / "server/clients.txt"
    names.write_text(f"# two\nb {'0' * 64}\na -\n" + names.read_text().splitlines()[-1])
    tokens = read_tokens(names)
    assert tokens.names == ["b", "a", "c"]
    assert not any(tokens.admits("a", word) for word in (token["a"], "", "-"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"host": None, "clients": ["a"]}, "--host is missing"),
        ({"host": "h", "clients": ["../a"]}, "expected a name of letters"),
        ({"host": "h", "clients": ["server"]}, "not 'server'"),
    ],
)
def test_keys_that_cannot_be_made_are_refused(options, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        write_keys(tmp_path, **options)


@pytest.mark.parametrize("text", ["a", "a zz", "a 00", f"a {'0' * 64}\na {'0' * 64}", ""])
def test_a_list_of_tokens_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "clients.txt").write_text(text)
    with pytest.raises(ConfigError, match=r"expected a new name|names no client"):
        read_tokens(tmp_path / "clients.txt")


LIKE = {"w": torch.zeros(NUMEL)}


@pytest.mark.parametrize(
    "said",
    [
        m.Next("1"),
        m.Next(True),
        m.Came(None),
        m.HandIn(1, (1.0,), LIKE),
        m.HandIn(1, (1.0, 1.0, 1.0, 1.0, "x"), LIKE),
        m.HandIn(1, (1.0,) * 5, None),
        m.HandIn(1, (1.0,) * 5, {}),
        m.HandIn(1, (1.0,) * 5, {"w": torch.zeros(NUMEL + 1)}),
        m.HandIn(1, (1.0,) * 5, {"w": torch.zeros(NUMEL, dtype=torch.float64)}),
        m.HandIn(1, (1.0,) * 5, {"w": torch.full((NUMEL,), torch.nan)}),
        m.HandIn(1, (1.0,) * 5, {**LIKE, "v": torch.zeros(1)}),
        m.Advertise(1, "00", "00" * 32),
        m.Advertise(1, "zz" * 32, "00" * 32),
        m.Share(1, {0: "0"}),
        m.Share(1, {"0": "00"}),
        m.Open(1, {0: "00"}, {}),
        m.Setup(1, {}),
        "hello",
        None,
    ],
)
def test_what_is_not_of_the_right_form_is_refused(said):
    assert problem_of(said, LIKE)


def test_what_is_of_the_right_form_is_taken():
    for said in (m.Next(0), hand_in(1), m.Advertise(1, "0f" * 32, "a0" * 32), m.Share(1, {3: "00ff"}), m.Came(2)):
        assert problem_of(said, LIKE) is None
    assert problem_of(m.Open(1, {1: "00" * 66}, {2: "00" * 66}), LIKE) is None


def test_a_frame_that_is_too_long_or_lies_in_memory_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        for buffer in frame(1, m.Next(0)):
            ours.sendall(buffer)
        ((header, body),) = Inbox(1 << 10).receive(theirs)
        assert read_frame(header, body, NoMemories()) == (1, m.Next(0))
        for buffer in frame(2, hand_in(1)):
            ours.sendall(buffer)
        with pytest.raises(ConnectionAbortedError, match="are the most"):
            Inbox(64).receive(theirs)
    (_, header) = frame(3, m.Next(0), body_at=("/proc/self/mem", 4096, 0))
    assert json.loads(header)[0][2] is not None
    with pytest.raises(ConnectionAbortedError, match="from another machine"):
        read_frame(header, bytearray(), NoMemories())


def test_addresses():
    assert address("fed.example.org:7440", "--server") == ("fed.example.org", 7440)
    assert address("[::1]:80", "--server") == ("::1", 80)
    for words in ("7440", "host:", ":80", "host:99999", "host:x"):
        with pytest.raises(TrainError.__base__, match="expected HOST:PORT"):
            address(words, "--server")
