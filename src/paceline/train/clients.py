"""What a federated run is put together from besides the parts of any run: clients, their rows and their rounds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paceline.comm.world import World
from paceline.config import Config
from paceline.data.client_loader import ClientLoader
from paceline.data.clients import Clients
from paceline.data.pack import PackedRows, PairedRows
from paceline.data.rounds import Rounds
from paceline.data.rows import Ints, Rows
from paceline.errors import PlanError
from paceline.plan.batch import BatchPlan
from paceline.sync.privacy import check_accounting, epsilon
from paceline.sync.secure.primitives import primitives


def check_extras(config: Config) -> None:
    """Raise ``MissingExtraError`` for what a run would miss at its end only."""
    sync: Any = config.syncs[-1]
    if config.in_rounds and sync.privacy is not None:
        check_accounting()
    if config.in_rounds and sync.secure is not None:
        primitives()


def owned_rows(
    train: Sequence[PackedRows | PairedRows], whose: Sequence[Ints], count: int, seed: int, first: int = 0
) -> Clients:
    """Whose the rows are, from whose the documents are: a row of packed documents holds those of one client.

    ``first``: the number of the first client.
    """
    of_rows = [
        np.repeat(np.arange(len(rows.rows_per_part)), rows.rows_per_part) if isinstance(rows, PackedRows) else own
        for rows, own in zip(train, whose, strict=True)
    ]
    return Clients(of_rows, count, seed, first)


def client_loader(
    config: Config, world: World, rows: Sequence[Rows], clients: Clients, batch: BatchPlan
) -> ClientLoader:
    """This rank's; ``PlanError`` for rounds of more clients than there are."""
    sync: Any = config.syncs[-1]
    if len(clients) < sync.clients_per_round:
        raise PlanError(
            f"sync.clients_per_round={sync.clients_per_round} is more than the {len(clients)} clients that have a "
            "whole sequence of text. Use fewer, or a smaller batch.sequence_tokens"
        )
    return ClientLoader(
        rows,
        clients,
        Rounds(clients.lengths, sync.rules(config.batch.sequences), config.seed),
        batch,
        replica=world.coordinates.replica,
        replicas=world.coordinates.replicas,
        rank=world.mesh.shard.index,
    )


def identity(config: Config, clients: Clients | None) -> str | None:
    """Who owns what, how rounds are made and what is promised: what must stay the same when a run goes on."""
    if clients is None:
        return None
    sync: Any = config.syncs[-1]
    words = [clients.fingerprint, sync.rules(config.batch.sequences), sync.moments, sync.privacy or ""]
    return " ".join(map(str, words))


def privacy_words(config: Config, clients: int, rounds: int) -> str | None:
    """What so many rounds have cost ``clients`` in all, where the run promises privacy."""
    sync: Any = config.syncs[-1]
    if sync.privacy is None:
        return None
    spent = epsilon(sync.privacy, rounds=rounds, cohort=sync.clients_per_round, clients=clients)
    return (
        f"epsilon {spent:.3g} at delta {sync.privacy.delta:g} after {rounds} rounds of {sync.clients_per_round} of "
        f"{clients} clients, one client replaced by another; of the weights, not of the losses that are shown"
    )
