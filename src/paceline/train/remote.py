"""A federated run whose clients are processes of their own: its rounds at the server, and its turns at a client."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from paceline import __version__
from paceline.config import Config
from paceline.data.client_loader import ClientLoader
from paceline.data.rounds import Rounds, Visit
from paceline.errors import LinkError
from paceline.sync.alone import wide
from paceline.sync.federation import FederatedSync
from paceline.sync.privacy import Privacy
from paceline.sync.remote.caller import Server
from paceline.sync.remote.gathering import OVER, Gathering
from paceline.sync.remote.hub import Hub
from paceline.sync.remote.masking import Masking
from paceline.sync.remote.shelf import Shelf
from paceline.sync.secure.mean import MaskedMean
from paceline.sync.server import messages as m
from paceline.sync.server.codec import raw
from paceline.sync.turn import Turn
from paceline.train.replica import ModuleReplica
from paceline.train.round import BatchOf, closed_round, local_steps
from paceline.train.step import StepResult


class AskedToStop(Exception):
    """The server was asked to stop while a round gathered; what had come is kept."""


class RemoteClients:
    """The clients of a run as its server sees them; in place of a loader of rows."""

    def __init__(
        self,
        hub: Hub,
        rounds: Rounds,
        config: Config,
        *,
        clients: int,
        folder: Path,
        deadline_s: float | None,
        is_asked_to_stop: Callable[[], bool],
    ) -> None:
        self._hub, self.rounds, self.clients = hub, rounds, clients
        self._options: Any = config.sync
        self._seed, self._folder, self._deadline_s = config.seed, folder, deadline_s
        self._is_asked_to_stop = is_asked_to_stop
        self.wait_s = 0.0
        """No rows are read here."""
        self.warning = None
        """Nor is anything known of them but how many there are."""

    def close(self) -> None:
        """Whoever opened the hub closes it."""

    def train_round(
        self, replica: ModuleReplica, sync: FederatedSync, *, step: int, rate: float
    ) -> tuple[StepResult, int]:
        """Run round ``step``: what came of it, and how many sequences were learned from.

        ``rate``: of the clients' optimizers, as a share of its peak. ``AskedToStop`` leaves the weights as they are.
        """
        asked, options = self.rounds.asked(step), self._options
        gathering = Gathering(
            step,
            asked,
            needed=options.clients_per_round,
            secure=options.secure,
            seed=self._seed,
            shelf=Shelf(self._folder, step),
        )
        weights = {shard.name: shard.local for shard in replica.shards}

        def work(client: int) -> m.Work:
            visit = tuple(asdict(gathering.visit(client)).values())
            return m.Work(step, visit, rate, sync.clip, gathering.place(client), len(asked), weights)

        is_whole = self._hub.gather(
            gathering, work, deadline_s=self._deadline_s, is_asked_to_stop=self._is_asked_to_stop
        )
        if not is_whole:
            raise AskedToStop
        whole, learned = gathering.result()
        sync.open(step, whole, replica)
        for visit, one in learned:
            sync.take(visit, one)
        if isinstance(sync.aggregation, MaskedMean):
            sync.aggregation.opening = gathering.opening()
        return closed_round(sync.close(step, whole, replica, False), step), whole.rows


class Visitor:
    """A client in a process of its own: it learns from its rows when it is asked to.

    ``loader_of``: from the number by which the server knows this client to what reads its rows. ``folder``: for what a
    new start of it has to know.
    """

    def __init__(
        self,
        server: Server,
        config: Config,
        replica: ModuleReplica,
        schedule: Any,
        batch_of: BatchOf,
        loader_of: Callable[[int], ClientLoader],
        *,
        folder: Path,
    ) -> None:
        self._server, self._replica, self._schedule, self._batch_of = server, replica, schedule, batch_of
        self._loader_of, self._folder, self._seed = loader_of, folder, config.seed
        options: Any = config.sync
        self._secure, self._privacy = options.secure, None
        if options.privacy is not None:
            self._privacy = Privacy(options.privacy, options.clients_per_round, "of the server")
        self._turn = Turn(options, privacy=self._privacy)
        self.weights: Mapping[str, Tensor] = {}
        """Those of the end, when it has come."""

    def rounds(self) -> Iterator[tuple[int, str]]:
        """The rounds this client takes part in, each when it is over for it, and in words what came of it."""
        after = 0
        while True:
            answer = self._server.ask(m.Next(after))
            match answer:
                case m.End(weights):
                    self.weights = weights
                    return
                case m.Work():
                    yield answer.round, self._work(answer)
                    after = answer.round
                case _:
                    raise LinkError(f"the server answered with {type(answer).__name__} where there is work or an end")

    def _work(self, work: m.Work) -> str:
        """Have a turn."""
        replica, privacy = self._replica, self._privacy
        visit = Visit(**dict(zip((field.name for field in fields(Visit)), work.visit, strict=True)))
        masking = None
        if self._secure is not None:
            masking = Masking(self._server, work, self._secure, seed=self._seed, folder=self._folder)
            if not masking.prepare():
                return OVER
        if privacy is not None and work.clip is not None:
            privacy.clip = work.clip
        replica.set_rate_factor(work.rate)
        begin = {shard.name: work.weights[shard.name].to(shard.local.device) for shard in replica.shards}
        self._turn.enter(visit, begin, replica)
        steps = self._loader_of(visit.client).steps(visit)
        local_steps(replica, self._turn, self._schedule, steps, self._batch_of, words=f"round {work.round}")
        learned = self._turn.leave(replica)
        losses, targets = learned.sums
        numbers = (float(learned.targets), losses, targets, learned.first_loss, float(learned.within))
        update: Mapping[str, Tensor] = {name: tensor.cpu() for name, tensor in learned.update.items()}
        if masking is not None:
            update = masking.mask(update)
        answer = self._server.ask(m.HandIn(work.round, numbers, dict(update)))
        if answer == m.Done(OVER) or (masking is not None and not masking.open()):
            return OVER
        return f"loss {losses / max(1.0, targets):.4f} over {visit.steps} local step(s) of {visit.rows} sequences"


def likeness(replica: ModuleReplica) -> dict[str, Tensor]:
    """Tensors of the form of an update."""
    return {shard.name: wide(shard.local) for shard in replica.shards}


def run_words(config: Config, model: nn.Module, tokenizer: Path) -> dict[str, str]:
    """What has to be the same at the server and at all clients, by key: all that what is learned follows from."""
    tree = config.tree()
    model_tree = {key: value for key, value in tree["model"].items() if key != "path"} if tree["model"] else None
    told = {
        "version": __version__,
        "model": model_tree,
        "the first weights": _digest(model),
        "the tokenizer": blake2b((tokenizer / "tokenizer.json").read_bytes(), digest_size=8).hexdigest(),
        "batch": tree["batch"],
        "train.clip_norm": [tree["train"][key] for key in ("clip_norm", "clip_block_norm", "clip_value")],
        "data.document": [tree["data"][key] for key in ("document", "field", "isolate_documents")],
        **{key: tree[key] for key in ("objective", "optimizer", "sync", "precision", "regularisation", "seed")},
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}


def _digest(model: nn.Module) -> str:
    """Of all that a model holds, learned or not."""
    digest = blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(raw(tensor.detach().cpu()))
    return digest.hexdigest()
