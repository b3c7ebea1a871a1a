"""Ranks and parameter servers on a real Ray cluster of this machine, also when some of them are killed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from commands import Command, paceline, tiny_config, write_texts
from paceline.errors import MissingExtraError, PlanError
from paceline.launch import ray as ray_run

STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of one with two CPUs, however many the machine has."""
    told = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield told.address_info["address"]
    ray.shutdown()


@pytest.fixture
def config(tmp_path) -> Path:
    write_texts(tmp_path)
    return tiny_config(
        tmp_path,
        replicas=2,
        sync={"name": "parameter_server", "servers": 2},
        train={"steps": STEPS},
        checkpoint={"every": 10},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def test_killed_ranks_and_servers_are_started_again_and_nothing_shows(cluster, config, tmp_path):
    """kill -9 of a server, then of a rank: the same weights in every bit as on this machine without Ray."""
    here = paceline(tmp_path, "train", str(config), "train.output=here")
    assert here.status == 0, here
    command = Command(tmp_path, "train", str(config), "--on", "ray", environment={"RAY_ADDRESS": cluster})
    run = tmp_path / "run"

    def wait_for(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60.0
        while not is_so():
            assert command.is_alive and time.monotonic() < deadline, command.end()
            time.sleep(0.002)

    def steps() -> int:
        path = run / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return json.loads(whole.splitlines()[-1])["step"] if whole else 0

    def pid_of(role: str) -> int:
        return [one["pid"] for one in json.loads((run / "processes.json").read_text()) if one["role"] == role][-1]

    wait_for(lambda: steps() >= 3)
    server, rank = pid_of("server"), pid_of("rank")
    os.kill(server, signal.SIGKILL)
    killed_at = steps()
    wait_for(lambda: steps() > killed_at + 3)
    os.kill(rank, signal.SIGKILL)
    ended = command.end()
    assert ended.status == 0, ended
    assert "a rank died: all begin anew from the newest checkpoint" in ended.out
    assert pid_of("rank") != rank
    one, other = weights(tmp_path / "here"), weights(run)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_of_a_rank_is_told_in_one_line(cluster, config, tmp_path):
    words = ["sync=all_reduce", "optimizer={name: sgd, lr: 1.0e+30}", "--on", "ray"]
    ended = paceline(tmp_path, "train", str(config), *words, environment={"RAY_ADDRESS": cluster})
    assert ended.status == 1
    assert ended.err.startswith("NonFinite") and "Traceback" not in ended.err


def test_it_is_refused_without_ray_and_under_torchrun(config, tmp_path, monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = paceline(tmp_path, "train", str(config), "--on", "ray", environment=environment)
    assert ended.status == PlanError.exit_status and "both start ranks" in ended.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"paceline\[ray\]"):
        ray_run.check()
