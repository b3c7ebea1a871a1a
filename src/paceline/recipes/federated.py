"""``paceline federated-server`` and ``federated-client``: a federated run whose clients are processes of their own."""

import secrets
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from paceline.comm.device import claim as claim_device
from paceline.comm.device import matmul_flops_per_s
from paceline.comm.ranks import Coordinates
from paceline.comm.world import World, join
from paceline.config import ClientsConfig, Config
from paceline.data.client_loader import ClientLoader
from paceline.data.rounds import Rounds
from paceline.data.rows import Ints
from paceline.data.tokens import TokenSet
from paceline.errors import ConfigError, PlanError
from paceline.export import hugging_face
from paceline.plan.batch import BatchPlan
from paceline.plan.federated import check_processes
from paceline.plan.layout import Grid
from paceline.plan.precision import resolve_precision
from paceline.plan.run import plan_run
from paceline.recipes import folder as run_folder
from paceline.recipes.train import Result, Say, leave_results
from paceline.sync.remote.caller import Server
from paceline.sync.remote.hub import Hub, address, listen
from paceline.sync.remote.keys import client_context, read_token, read_tokens, server_context
from paceline.sync.server import messages as m
from paceline.train.assemble import Material, Remote, make_material, put_together
from paceline.train.clients import check_extras, owned_rows
from paceline.train.policy import StopRequest
from paceline.train.records import open_records, write_text
from paceline.train.remote import AskedToStop, RemoteClients, Visitor, likeness, run_words
from paceline.train.resume import find
from paceline.train.trainer import Loop


@dataclass(frozen=True, kw_only=True)
class Visited:
    """What a client came to."""

    output: str
    rounds: int
    """It took part in, since this start."""
    is_done: bool

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def _tell(text: str) -> None:
    print(text, flush=True)


def serve(
    config: Config,
    at: str,
    keys: Path,
    *,
    deadline_s: float | None,
    linger_s: float,
    stop: StopRequest | None = None,
    say: Say = _tell,
) -> Result:
    """Run the server of a federated run to its end; run again, it continues where it was.

    ``stop``: ends it between two messages; by default SIGTERM and Ctrl-C do.
    """
    config = _checked(config, deadline_s=deadline_s)
    tokens, context = read_tokens(keys / "clients.txt"), server_context(keys)
    sync: Any = config.sync
    if len(tokens.names) < sync.clients_per_round:
        raise PlanError(
            f"sync.clients_per_round={sync.clients_per_round} is more than the {len(tokens.names)} clients of "
            f"{keys / 'clients.txt'}. Use fewer"
        )
    # A round is on disk before its weights are given to anyone: so what a killed server does again is the same.
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 1})})
    if stop is None:
        stop = StopRequest()
        stop.listen(signal.SIGTERM, signal.SIGINT)
    with run_folder.claim(config.train.output) as output, closing(listen(at)) as listening, _alone(config) as world:
        find(output / "checkpoints", config.checkpoint.resume)
        material = make_material(config, owners_of=lambda *_: (None, 0), say=say)
        assert material.model is not None
        hub = Hub(
            listening,
            context,
            tokens,
            run=run_words(config, material.model, material.prepared.tokenizer),
            folder=output,
            say=say,
        )
        say(f"listening at {at} for {len(tokens.names)} clients")
        with closing(hub):
            rows = hub.enrol(lambda: stop.asked)
            if rows is None:
                return Result(output=str(output), step=0, steps=config.train.steps, is_done=False)
            loop = _server_loop(config, world, material, hub, rows, output, deadline_s, stop)
            return _rounds(loop, hub, config, linger_s)


def _server_loop(
    config: Config,
    world: World,
    material: Material,
    hub: Hub,
    rows: dict[str, int],
    output: Path,
    deadline_s: float | None,
    stop: StopRequest,
) -> Loop:
    sync: Any = config.sync
    counts = np.array(list(rows.values()), np.int64)
    rounds = Rounds(counts, sync.rules(config.batch.sequences), config.seed)
    who = blake2b(repr(rows).encode(), digest_size=8).hexdigest()

    def loader(_: BatchPlan) -> RemoteClients:
        return RemoteClients(
            hub,
            rounds,
            config,
            clients=len(rows),
            folder=output / "rounds",
            deadline_s=deadline_s,
            is_asked_to_stop=lambda: stop.asked,
        )

    remote = Remote(
        loader=loader,
        identity=f"{who} {sync.rules(config.batch.sequences)} {sync.privacy or ''}",
        secret=_secret(output) if sync.privacy is not None else None,
    )
    loop = Loop(_parts(config, world, replace(material, remote=remote), saves=True))
    hub.begin(likeness(loop.parts.built.replica))
    return loop


def _rounds(loop: Loop, hub: Hub, config: Config, linger_s: float) -> Result:
    loss, is_stopped = None, False
    with loop:
        open_records(loop)
        try:
            for event in loop.steps():
                loss = event.loss
                loop.finish_saving()
        except AskedToStop:
            is_stopped = True
            if loop.trackers:
                loop.trackers.event("stop", f"asked to stop in round {loop.step + 1}", step=loop.step)
        if not is_stopped:
            loop.finish_saving()
            leave_results(loop)
            if loop.is_done:
                shards = loop.parts.built.replica.shards
                hub.end({shard.name: shard.local for shard in shards}, wait_s=linger_s)
        return Result.of(loop, loss)


def visit(config: Config, at: str, keys: Path, *, patience_s: float, say: Say = _tell) -> Visited:
    """Be a client until the run is over; then its weights are in the output's ``export``. All data is learned from."""
    config = _checked(config)
    # Nothing is measured here, so nothing is held out.
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0.0})})
    (name, token), context = read_token(keys / "token.txt"), client_context(keys)
    with run_folder.claim(config.train.output) as output, _alone(config) as world:
        material = make_material(config, owners_of=_all_own, say=say)
        whose, _ = _all_own(material.prepared.train)
        train: Any = material.train

        def loader_of(number: int, batch: BatchPlan) -> ClientLoader:
            clients = owned_rows(train, whose, 1, config.seed, number)
            rounds = Rounds(clients.lengths, config.sync.rules(config.batch.sequences), config.seed)  # type: ignore[union-attr]
            return ClientLoader(train, clients, rounds, batch, replica=0, replicas=1, rank=0)

        hello = m.Hello(
            name, token, run_words(config, material.model, material.prepared.tokenizer), sum(map(len, material.train))
        )
        remote = Remote(loader=lambda batch: loader_of(0, batch))
        parts = _parts(config, world, replace(material, remote=remote), saves=False)
        built, batch = parts.built, parts.batches.full
        server = Server(address(at, "--server"), context, hello, patience_s=patience_s, say=say)
        visitor = Visitor(
            server,
            config,
            built.replica,
            built.schedule,
            lambda rows, step: built.split(parts.objective.batch(rows, seed=config.seed, step=step)),
            lambda number: loader_of(number, batch),
            folder=output / "secure",
        )
        count = 0
        with closing(server):
            say(f"{name}: {hello.rows} rows to learn from, server {at}")
            for step, words in visitor.rounds():
                count += 1
                say(f"round {step}: {words}")
        built.replica.hold({key: value.to(world.device.torch_device) for key, value in visitor.weights.items()})
        if parts.source is not None:
            learned = {key: p.detach() for key, p in built.replica.local.items()}
            weights = {key: learned.get(key, value) for key, value in built.model.state_dict().items()}
            hugging_face.write(output / "export", weights, parts.source, parts.prepared.tokenizer)
        return Visited(output=config.train.output, rounds=count, is_done=True)


def _checked(config: Config, *, deadline_s: float | None = None) -> Config:
    if config.model is None:
        raise ConfigError("model is missing; set model.config, model.preset or model.path")
    check_processes(config, deadline_s=deadline_s)
    plan_run(config)
    check_extras(config)
    return config


def _alone(config: Config) -> Any:
    """The world of one rank."""
    place = Coordinates.of(0, replicas=1, ranks=1, local_rank=0, local_ranks=1)
    return join(place, claim_device(place), None, Grid.of(config.layout), config.group_sizes)


def _parts(config: Config, world: World, material: Material, *, saves: bool) -> Any:
    precision = resolve_precision(config, world.device.units)
    import torch

    peak = matmul_flops_per_s(world.device, getattr(torch, precision.compute)) if saves else 1.0
    return put_together(config, world, material, precision=precision, peak_flops_per_s=peak, saves=saves)


def _all_own(token_sets: Sequence[TokenSet], _: ClientsConfig | None = None, __: int = 0) -> tuple[list[Ints], int]:
    """Every document is this client's."""
    return [np.zeros(len(token_set), np.int64) for token_set in token_sets], 1


def _secret(output: Path) -> str:
    """What the noise of privacy follows from: clients know the seed. Made once, and the server's alone."""
    path = output / "secret.txt"
    if not path.exists():
        write_text(path, secrets.token_hex(32))
        path.chmod(0o600)
    return path.read_text().strip()
