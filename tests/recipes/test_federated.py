"""Federated runs whose clients are processes of their own, against the same run played by one process, in every bit."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from commands import Command, metrics, paceline
from federated_processes import (
    Site,
    alone,
    client_overrides,
    free_address,
    run_site,
    server_overrides,
    weights,
    write_config,
    write_site,
)
from paceline.config import read
from paceline.errors import LinkError, PlanError
from paceline.recipes.federated import visit

CLIENTS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("federated")
    write_site(made, CLIENTS)
    return made


@pytest.fixture(autouse=True)
def _clean(folder):
    yield
    for run in ("one", "server", *(f"client-{k}" for k in range(CLIENTS))):
        shutil.rmtree(folder / run, ignore_errors=True)


def assert_same(folder: Path) -> None:
    """Weights in every bit, and the losses that are shown."""
    one, other = weights(folder / "one"), weights(folder / "server")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in metrics(folder / run)] for run in ("one", "server")]
    assert losses[0] == losses[1]


RULES = {
    "adam": {"server": {"name": "fedadam", "lr": 0.05}, "clients_per_round": 3, "proximal": 0.1},
    "epochs": {"epochs": 1, "local_steps": None, "weights": "data", "clients_per_round": 3},
    "fair": {"q": 0.5, "weights": "uniform", "clients_per_round": 3},
    "median": {"aggregate": {"name": "median", "faulty": 1}, "weights": "uniform", "clients_per_round": 4},
    "secure": {"secure": {}, "weights": "uniform", "clients_per_round": 4},
    "private": {
        "privacy": {"clip": 0.02, "noise": 0.3, "adaptive": {"count_noise": 2.0}},
        "secure": {},
        "weights": "uniform",
        "clients_per_round": 3,
    },
}


@pytest.mark.parametrize("rule", RULES)
def test_clients_of_their_own_give_what_one_process_gives(rule, folder):
    """What joins the updates, at the server; privacy with the noise of the seed, which a server keeps to itself."""
    config = write_config(folder, sync=RULES[rule])
    (folder / "server").mkdir()
    (folder / "server" / "secret.txt").write_text("0")
    alone(config)
    site = run_site(folder, config, range(CLIENTS))
    assert not site.errors
    assert_same(folder)
    for client in range(CLIENTS):
        own, server = weights(folder / f"client-{client}"), weights(folder / "server")
        assert all(torch.equal(own[name], server[name]) for name in own)


def test_who_does_not_come_is_left_out(folder):
    """Over-selected, with one client that is never there after it has enrolled: the sum is that of the others."""
    sync = {"clients_per_round": 3, "over_selection": 0.3, "weights": "uniform"}
    rows = {f"site-{k}": 10**6 for k in range(CLIENTS)}
    for secure in (None, {}):
        config = write_config(folder, sync={**sync, "secure": secure}, train={"steps": 3})
        (folder / "server").mkdir()
        there = Site(folder, config)
        for client in (0, 1, 3, 4):
            there.client(client)
        rows |= {f"site-{k}": n for k, n in row_counts(folder).items()}
        (folder / "server" / "clients.json").write_text(json.dumps(rows))
        assert there.serve(deadline_s=1.0).is_done
        there.join()
        assert not there.errors
        came = {client for client in (0, 1, 3, 4) if any(": loss" in line for line in there.said[f"client {client}"])}
        assert len(came) >= 3
        shutil.rmtree(folder / "server")
        for client in (0, 1, 3, 4):
            shutil.rmtree(folder / f"client-{client}")


def row_counts(folder: Path) -> dict[int, int]:
    """What each client will say of its rows."""
    from paceline.recipes.federated import _all_own
    from paceline.train.assemble import make_material

    counts = {}
    for client in (0, 1, 3, 4):
        config = read(folder / "config.yaml", [*client_overrides(folder, client), "data.held_out=0.0"])
        material = make_material(config, owners_of=_all_own, say=lambda _: None)
        counts[client] = sum(map(len, material.train))
    return counts


def test_killed_processes_come_back_and_nothing_shows(folder):
    """kill -9 of a client, then of the server in the middle of a round, through the command line."""
    config = write_config(folder, sync={"clients_per_round": 3, "local_steps": 3}, train={"steps": 3})
    alone(config)
    at = free_address()

    def client(number: int) -> Command:
        (home := folder / f"home-{number}").mkdir(exist_ok=True)
        words = ["--keys", str(folder / f"keys/site-{number}"), "--server", at, *client_overrides(folder, number)]
        return Command(home, "federated-client", str(config), *words)

    def server() -> Command:
        words = ["--keys", str(folder / "keys/server"), "--listen", at, "--linger-s", "1", *server_overrides(folder)]
        return Command(folder, "federated-server", str(config), *words)

    def wait_for(pattern: str) -> None:
        deadline = time.monotonic() + 60.0
        while not list((folder / "server" / "rounds").glob(pattern)):
            assert time.monotonic() < deadline, pattern
            time.sleep(0.005)

    serving, clients = server(), [client(number) for number in range(CLIENTS)]
    wait_for("round-000001/update/*.bin")
    clients[0].signal(signal.SIGKILL)
    clients[0].end()
    clients[0] = client(0)
    wait_for("round-000002/update/*.bin")
    os.kill(serving.pid, signal.SIGKILL)
    serving.end()
    serving = server()
    ended = serving.end()
    assert ended.status == 0, ended
    assert [each.end().status for each in clients] == [0] * CLIENTS
    assert_same(folder)


def test_a_stopped_server_goes_on(folder):
    config = write_config(folder)
    alone(config)
    at = free_address()
    words = ["--keys", str(folder / "keys/server"), "--listen", at, *server_overrides(folder)]
    (folder / ".out").unlink(missing_ok=True)  # of a command before
    serving = Command(folder, "federated-server", str(config), *words)
    deadline = time.monotonic() + 60.0
    while not (folder / ".out").exists() or "listening" not in (folder / ".out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    serving.signal(signal.SIGTERM)
    ended = serving.end()
    assert ended.status == 0 and "stopped after round 0 of 2" in ended.out
    run_site(folder, config, range(CLIENTS))
    assert_same(folder)


def test_strangers_and_other_runs_are_refused(folder):
    """A wrong token, another certificate, another config, other data: each in one line, and the run goes on."""
    config = write_config(folder)
    site = Site(folder, config)
    for client in range(1, CLIENTS):
        site.client(client)
    problems = []

    def refused(keys: Path, *overrides: str) -> None:
        try:
            visit(
                read(config, [*client_overrides(folder, 0), f"train.output={folder}/refused", *overrides]),
                site.at,
                keys,
                patience_s=20.0,
                say=lambda _: None,
            )
        except LinkError as error:
            problems.append(str(error))

    strangers = folder / "strangers"
    paceline(folder, "federated-keys", str(strangers), "--host", "localhost", "--clients", "site-0,site-9")
    wrong = folder / "wrong"
    wrong.mkdir()
    (wrong / "ca.pem").write_bytes((folder / "keys/ca.pem").read_bytes())
    (wrong / "token.txt").write_text("site-0 guessed\n")

    def all_refused() -> None:
        refused(wrong)
        refused(strangers / "site-0")
        refused(folder / "keys/site-0", "optimizer.lr=0.02")
        refused(folder / "keys/site-0", "seed=1")
        site.client(0)

    site.beside(all_refused)
    assert site.serve().is_done
    site.join()
    assert "does not know 'site-0' by this token" in problems[0]
    assert "is not the one that ca.pem knows" in problems[1]
    assert "optimizer=" in problems[2] and "Use the same config file" in problems[2]
    assert "the first weights=" in problems[3]
    assert len(problems) == 4 and not site.errors
    assert any("the token of 'site-0' is wrong" in line for line in site.said["server"])
    shutil.rmtree(folder / "refused")


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"sync": "all_reduce", "data": {"clients": None}}, "has no clients"),
        ({"data": {"clients": {"by": "dirichlet", "count": 3}}}, "makes clients up"),
        ({"data": {"clients": {"by": "natural", "count": 3}}}, "makes clients up"),
        ({"data": {"tokenizer": None}}, "no client may see the text of all"),
        ({"replicas": 2}, "is one rank"),
        ({"layout": {"tensor": 2}}, "layout.tensor: the server"),
        ({"sync": {"speed_spread": 0.5, "deadline": 3.0}}, "are of simulated clients"),
        ({"sync": {"moments": "keep"}}, "moments=keep with clients in processes"),
    ],
)
def test_what_processes_cannot_do_is_refused(sections, reason, folder):
    site = Site(folder, write_config(folder, **sections))
    with pytest.raises(PlanError, match=reason):
        site.serve()


def test_a_deadline_does_not_go_with_what_counts_on_everyone(folder):
    config = write_config(folder, sync={"weights": "uniform", "privacy": {"clip": 1.0, "noise": 1.0}})
    with pytest.raises(PlanError, match="--deadline-s leaves clients out"):
        Site(folder, config).serve(deadline_s=5.0)
