"""One round at the server: what its clients have said so far, and what each is answered. It sends nothing.

    plain     hand in                                                         the round closes
    secure    advertise -> share -> hand in masked -> open                    the round closes

Each stage ends when all have spoken who spoke in the one before, that of handing in when as many have as the round
waits for; or, when the time is over (``is_late``), with those who have, if they are enough. Who was in a stage is
decided once, and kept; what comes later is told that it is over.

A message that comes again changes nothing and is answered the same, so clients may ask again, die and come back.
"""

from collections.abc import Iterator, Sequence, Set

from paceline.data.rounds import Round, Visit, made_of
from paceline.errors import TrainError
from paceline.sync.remote.shelf import Shelf
from paceline.sync.secure.mean import SecureOptions, neighbours_of
from paceline.sync.secure.primitives import primitives
from paceline.sync.secure.protocol import Opened, Opening, PublicKeys
from paceline.sync.server import messages as m
from paceline.sync.turn import Learned

Said = m.Advertise | m.Share | m.HandIn | m.Came | m.Open
OVER = "over"
"""Says ``Done`` to a client for whom the round did not wait."""
_KINDS: dict[type, str] = {m.Advertise: "advertise", m.Share: "share", m.HandIn: "update", m.Open: "open"}


class Gathering:
    """Round ``step``; ``needed``: updates it waits for, of the clients ``asked``."""

    def __init__(
        self,
        step: int,
        asked: Sequence[Visit],
        *,
        needed: int,
        secure: SecureOptions | None,
        seed: int,
        shelf: Shelf,
    ) -> None:
        self.step, self._asked, self._needed = step, asked, min(needed, len(asked))
        self._secure, self._shelf = secure, shelf
        self.clients = sorted(visit.client for visit in asked)
        self._place = {client: place for place, client in enumerate(self.clients)}
        self._stages = ["update"] if secure is None else ["advertise", "share", "update", "open"]
        n = len(self.clients)
        self._neighbours = neighbours_of(secure, n, seed, step) if secure is not None else []
        self._threshold = secure.opens(n) if secure is not None else 1
        self._opening: Opening | None = None
        self.advance(is_late=False)

    def visit(self, client: int) -> Visit:
        """What a client is asked for."""
        return next(visit for visit in self._asked if visit.client == client)

    def place(self, client: int) -> int:
        """Among those asked."""
        return self._place[client]

    @property
    def is_secure(self) -> bool:
        """Whether what is handed in is masked."""
        return self._secure is not None

    @property
    def stage(self) -> str:
        """What clients are to do now, or ``over``."""
        return next((stage for stage in self._stages if not self._shelf.kept(f"closed-{stage}")), "over")

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.stage == "over"

    @property
    def missing(self) -> list[int]:
        """Clients for whom the stage of now waits, if it waits for all."""
        return [] if self.is_over else sorted(set(self._expected(self.stage)) - set(self._shelf.kept(self.stage)))

    def wants(self, client: int) -> bool:
        """Whether a client that asks for work has any in this round."""
        stage = self.stage
        return stage != "over" and client in self._expected(stage) and client not in self._shelf.kept(self._stages[-1])

    def receive(self, client: int, said: Said) -> None:
        """Keep what is new and comes in time."""
        kind = _KINDS.get(type(said))
        if kind is None or said.round != self.step or client not in self._place:
            return
        if kind == self.stage and client in self._expected(kind) and client not in self._shelf.kept(kind):
            self._shelf.put(kind, client, said)
            self.advance(is_late=False)

    def answer(self, client: int, said: Said) -> m.Done | m.Keys | m.Shares | None:
        """What a client is told, or None: not yet."""
        over = m.Done(OVER)
        if said.round != self.step or client not in self._place:
            return over
        if isinstance(said, m.HandIn | m.Open):
            return m.Done() if client in self._shelf.kept(_KINDS[type(said)]) else over
        stage = "update" if isinstance(said, m.Came) else _KINDS[type(said)]
        if not self._shelf.kept(f"closed-{stage}"):
            return None
        if client not in self._closed(stage):
            return over
        match said:
            case m.Advertise():
                return self._keys()
            case m.Share():
                return self._shares(client)
        return m.Done([self._place[other] for other in self._closed("update")])

    def advance(self, *, is_late: bool) -> None:
        """End the stages that may end. ``is_late``: the time for the one of now is over."""
        while (stage := self.stage) != "over":
            said, expected = self._shelf.kept(stage), self._expected(stage)
            enough = self._needed if stage == "update" else len(expected)
            if not (len(said) >= enough or (is_late and self._are_enough(stage, said))):
                return
            self._shelf.put(f"closed-{stage}", 0, sorted(said))
            is_late = False

    def result(self) -> tuple[Round, Iterator[tuple[Visit, Learned]]]:
        """The round as it was, and what its clients handed in, in its order, read one at a time."""
        whole = made_of(self._asked, set(self._closed("update")), 0.0)
        return whole, ((visit, self._learned(visit.client)) for visit in whole.visits)

    def opening(self) -> Opening:
        """What the clients opened."""
        if self._opening is None:
            public = {place: public_keys(keys) for place, keys in self._keys().keys.items()}
            paired = {
                place: [other for other in self._neighbours[place] if self.clients[other] in self._closed("share")]
                for place in (self._place[client] for client in self._closed("share"))
            }
            opened = {}
            for client in sorted(self._shelf.kept("open")):
                told: m.Open = self._shelf.get("open", client)
                opened[self._place[client]] = Opened(own_masks=_bytes(told.masks), keys=_bytes(told.keys))
            came = [self._place[client] for client in self._closed("update")]
            try:
                self._opening = Opening(public, paired, came, opened, self._threshold, primitives())
            except ValueError as error:
                raise TrainError(
                    f"secure aggregation, round {self.step}: {error}; some client does not follow"
                ) from None
        return self._opening

    def _expected(self, stage: str) -> list[int]:
        """Of whom something may come."""
        before = self._stages.index(stage) - 1
        return self.clients if before < 0 else self._closed(self._stages[before])

    def _closed(self, stage: str) -> list[int]:
        clients: list[int] = self._shelf.get(f"closed-{stage}", 0)
        return clients

    def _keys(self) -> m.Keys:
        keys = {}
        for client in self._closed("advertise"):
            said: m.Advertise = self._shelf.get("advertise", client)
            keys[self._place[client]] = (said.masks, said.seals)
        return m.Keys(keys)

    def _shares(self, client: int) -> m.Shares:
        place, sealed = self._place[client], {}
        for other in self._closed("share"):
            said: m.Share = self._shelf.get("share", other)
            if place in said.sealed:
                sealed[self._place[other]] = said.sealed[place]
        return m.Shares(sealed)

    def _are_enough(self, stage: str, said: Set[int]) -> bool:
        """Whether a stage may end with so few: everyone's secrets can be opened by those who are left."""
        if self._secure is None:
            return len(said) > 0
        if stage == "open":
            try:
                self.opening()
            except TrainError:
                return False
            return True
        places = {self._place[client] for client in said}
        whose = places if stage != "update" else {self._place[client] for client in self._closed("share")}
        return len(places) >= 3 and all(len(places & set(self._neighbours[i])) >= self._threshold for i in whose)

    def _learned(self, client: int) -> Learned:
        said: m.HandIn = self._shelf.get("update", client)
        targets, losses, loss_targets, first_loss, within = said.numbers
        return Learned(
            update=said.update,
            targets=int(targets),
            sums=(losses, loss_targets),
            first_loss=first_loss,
            within=bool(within),
        )


def _bytes(by_place: dict[int, str]) -> dict[int, bytes]:
    return {place: bytes.fromhex(word) for place, word in by_place.items()}


def public_keys(words: tuple[str, str]) -> PublicKeys:
    """A client's, as it told them."""
    masks, seals = words
    return PublicKeys(masks=bytes.fromhex(masks), seals=bytes.fromhex(seals))
