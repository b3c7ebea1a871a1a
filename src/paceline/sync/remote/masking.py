"""A client's part in secure aggregation, over the wire: from its update to a masked one, and the opening of the sum.

Its secrets follow from bytes that are kept on disk while the round lasts, and from the weights that it was given. So a
client that dies and comes back is the same to its neighbours; and one that is given other weights in the same round,
which no honest server does, never masks two vectors alike.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from paceline.errors import LinkError, TrainError
from paceline.sync.aggregation import Update
from paceline.sync.remote.caller import Server
from paceline.sync.remote.gathering import OVER, public_keys
from paceline.sync.secure.mean import SecureOptions, as_masked, code, flattened, neighbours_of, stream
from paceline.sync.secure.primitives import primitives
from paceline.sync.secure.protocol import Client
from paceline.sync.server import messages as m
from paceline.sync.server.codec import raw


class Masking:
    """In one round. A method that gives False or None found that the round went on without this client."""

    def __init__(self, server: Server, work: m.Work, options: SecureOptions, *, seed: int, folder: Path) -> None:
        self._server, self._work, self._options = server, work, options
        own = neighbours_of(options, work.asked, seed, work.round)[work.place]
        random = stream(_secret(folder, work.round) + _digest(work.weights))
        self._client = Client(work.place, own, options.opens(work.asked), primitives(), random, options.bits)
        self._neighbours = set(own)
        self._opened = folder / f"opened-{work.round:06d}"

    def prepare(self) -> bool:
        """Before the client learns: tell keys, and share its secrets with its neighbours."""
        public, step = self._client.public, self._work.round
        keys = self._server.ask(m.Advertise(step, public.masks.hex(), public.seals.hex()))
        if not isinstance(keys, m.Keys):
            return _is_over(keys)
        known = {place: public_keys(words) for place, words in keys.keys.items() if place in self._neighbours}
        sealed = self._client.share(known)
        shares = self._server.ask(m.Share(step, {place: word.hex() for place, word in sealed.items()}))
        if not isinstance(shares, m.Shares):
            return _is_over(shares)
        self._sealed = {place: bytes.fromhex(word) for place, word in shares.sealed.items()}
        return True

    def mask(self, update: Mapping[str, Tensor]) -> Update:
        """The masked vector of an update."""
        codes = code(self._options, self._work.asked).encode(flattened(update, list(update)))
        return as_masked(self._client.mask(self._sealed, codes))

    def open(self) -> bool:
        """Help the server to open the sum, once it is known who is in it; of one round, one sum."""
        came = self._server.ask(m.Came(self._work.round))
        if not isinstance(came, m.Done) or came.payload == OVER:
            return _is_over(came)
        self._remember(came.payload)
        opened = self._client.unmask(came.payload)
        masks = {place: share.hex() for place, share in opened.own_masks.items()}
        keys = {place: share.hex() for place, share in opened.keys.items()}
        answer = self._server.ask(m.Open(self._work.round, masks, keys))
        return answer == m.Done() or _is_over(answer)

    def _remember(self, came: Sequence[int]) -> None:
        """Refuse to open another sum of this round, also after a new start."""
        words = " ".join(map(str, sorted(came)))
        if self._opened.exists() and self._opened.read_text() != words:
            raise TrainError(
                f"secure aggregation: the server asks to open a second sum of round {self._work.round}, which would "
                "show single updates. It does not follow the protocol"
            )
        self._opened.write_text(words)


def _secret(folder: Path, step: int) -> bytes:
    """Bytes of a round, the same after a new start; those of rounds before are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"secret-{step:06d}"
    for old in folder.glob("secret-*"):
        if old != path:
            old.unlink()
    if not path.exists():
        temporary = folder / "secret.tmp"
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        os.replace(temporary, path)
    return path.read_bytes()


def _digest(weights: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(raw(tensor))
    return digest.digest()


def _is_over(answer: object) -> bool:
    if isinstance(answer, m.Done) and answer.payload == OVER:
        return False
    raise LinkError(f"the server answered with {type(answer).__name__}, which is nothing for this stage of a round")
