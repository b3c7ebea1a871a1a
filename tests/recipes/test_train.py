import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from commands import Command, metrics, paceline, tiny_config, write_texts
from paceline.config import read
from tolerances import FP32_GRADIENT

LOSSY = ("tokens_per_s", "mfu", "step_s", "data_wait_s", "memory_bytes", "time")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path)
    return tmp_path


def learned(run: Path) -> list[dict[str, float]]:
    """What a run learned, line by line, without what a clock says."""
    return [{key: value for key, value in line.items() if key not in LOSSY} for line in metrics(run)]


def until_step(command: Command, run: Path, step: int) -> None:
    """Return when ``metrics.jsonl`` has that step; fails if the command ends before."""
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert command._process.is_alive(), command.end()
        time.sleep(0.005)  # a poll of a file, not a synchronisation: the condition is checked


def processes(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "processes.json").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_leaves_what_the_readme_says(folder):
    config = tiny_config(folder, replicas=2, evaluate={"every": 3, "prompts": ["The oak"]}, checkpoint={"every": 3})
    ended = paceline(folder, "train", str(config), "--json")
    assert ended.status == 0, ended
    run = folder / "run"
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["tokens_seen"] == 6 * 4 * 32
    assert ended.json()["step"] == 6 and ended.json()["bits_per_byte"] > 0
    assert read(run / "config.yaml") == read(config), "the resolved config gives the same run"
    roles = [(p["role"], p["replica"], p["rank"]) for p in processes(run)]
    assert roles == [("launcher", None, None), ("rank", 0, 0), ("rank", 1, 0)]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert (run / "logs" / "rank-0001.log").exists()
    assert "<svg" in (run / "report.html").read_text()
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [3, 6] and evaluations[0]["samples"][0]["prompt"] == "The oak"


def test_the_export_is_the_model(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from paceline.checkpoint import load

    ended = paceline(folder, "train", str(tiny_config(folder)))
    assert ended.status == 0, ended
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "export")
    with load(folder / "run" / "checkpoints", 6) as checkpoint:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, checkpoint.tensor(f"model/{name}")), name
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "export")
    assert tokenizer.decode(tokenizer("The oak stands").input_ids) == "The oak stands"


@pytest.mark.parametrize("sync", ["all_reduce", {"name": "diloco", "every": 4}], ids=["all_reduce", "diloco"])
def test_killed_at_any_moment_and_resumed_the_losses_are_bit_for_bit_the_same(folder, sync):
    config = tiny_config(folder, replicas=2, sync=sync, checkpoint={"every": 3}, train={"steps": 14, "output": "whole"})
    assert paceline(folder, "train", str(config)).status == 0
    for kill_after in (2, 7, 11):
        command = Command(folder, "train", str(config), "train.output=broken")
        until_step(command, folder / "broken", kill_after)
        for process in processes(folder / "broken"):
            os.kill(process["pid"], signal.SIGKILL)
        command.end()
    ended = paceline(folder, "train", str(config), "train.output=broken")
    assert ended.status == 0, ended
    assert learned(folder / "broken") == learned(folder / "whole")
    kinds = [json.loads(line)["kind"] for line in (folder / "broken" / "events.jsonl").read_text().splitlines()]
    assert "resume" in kinds


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_resumed_on_another_number_of_replicas_the_same_batches_follow(folder, before, after):
    sgd = {"name": "sgd", "lr": 0.5}
    config = tiny_config(folder, optimizer=sgd, batch={"sequences": 5}, train={"steps": 8, "output": "whole"})
    assert paceline(folder, "train", str(config)).status == 0
    common = ["train", str(config), "train.output=changed", "checkpoint.every=4"]
    command = Command(folder, *common, f"replicas={before}")
    until_step(command, folder / "changed", 5)
    command.signal(signal.SIGTERM)
    assert command.end().status == 0
    assert paceline(folder, *common, f"replicas={after}").status == 0
    for one, other in zip(learned(folder / "whole"), learned(folder / "changed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=FP32_GRADIENT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_saves_and_exits_cleanly(folder, number):
    config = tiny_config(folder, replicas=2, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    until_step(command, folder / "run", 4)
    command.signal(number)
    ended = command.end()
    assert ended.status == 0, ended
    last = metrics(folder / "run")[-1]["step"]
    assert f"stopped after step {last} of 100000" in ended.out
    assert [p.name for p in (folder / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert (folder / "run" / "export" / "config.json").exists()


def test_replicas_that_learn_alone_stop_when_they_next_talk(folder):
    sync = {"name": "local_sgd", "every": 7}
    config = tiny_config(folder, replicas=2, sync=sync, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    until_step(command, folder / "run", 4)
    os.kill(processes(folder / "run")[2]["pid"], signal.SIGTERM)  # replica 1 alone
    ended = command.end()
    assert ended.status == 0, ended
    last = metrics(folder / "run")[-1]["step"]
    assert last % 7 == 0 and f"stopped after step {last} of 100000" in ended.out
    assert (folder / "run" / "export" / "config.json").exists()


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM of its own."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)


def test_asked_to_stop_before_the_first_step_it_exits_cleanly_too(folder):
    config = tiny_config(folder, replicas=2, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    started = folder / "run" / "processes.json"
    while not (started.exists() and all(listens(p["pid"]) for p in processes(folder / "run"))):
        assert command._process.is_alive(), command.end()
        time.sleep(0.001)  # a poll, not a synchronisation: the condition is checked
    command.signal(signal.SIGINT)
    ended = command.end()
    assert ended.status == 0 and "stopped after step" in ended.out, ended


def test_a_rank_that_dies_is_named_and_nothing_is_left_running(folder):
    config = tiny_config(folder, replicas=2, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    until_step(command, folder / "run", 3)
    pids = [p["pid"] for p in processes(folder / "run")]
    os.kill(pids[2], signal.SIGKILL)
    ended = command.end()
    assert ended.status == 1
    assert "rank 1 (replica 1) died: killed by SIGKILL (exit code -9)" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not any(alive(pid) for pid in pids)


def test_a_killed_launcher_leaves_no_rank_behind(folder):
    config = tiny_config(folder, replicas=2, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    until_step(command, folder / "run", 3)
    pids = [p["pid"] for p in processes(folder / "run")]
    command.signal(signal.SIGKILL)
    command.end()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.01)


def test_a_loss_that_is_not_finite_names_step_and_layer(folder):
    config = tiny_config(folder, optimizer={"name": "sgd", "lr": 1e30}, replicas=2)
    ended = paceline(folder, "train", str(config))
    assert ended.status == 1
    assert "at step 2" in ended.err and "began in" in ended.err and "model." in ended.err
    assert len(ended.err.splitlines()) == 1


def test_recompute_and_accumulation_change_nothing_but_memory(folder):
    plain = tiny_config(folder, train={"output": "plain"})
    assert paceline(folder, "train", str(plain)).status == 0
    changed = ["batch.micro=1", "layout.recompute=full", "train.output=changed"]
    assert paceline(folder, "train", str(plain), *changed).status == 0
    for one, other in zip(learned(folder / "plain"), learned(folder / "changed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=FP32_GRADIENT)


def test_the_same_under_torchrun(folder):
    """Started as torchrun starts them: one process for each rank, told who they are by variables."""
    config = tiny_config(folder, replicas=2, train={"output": "whole"})
    assert paceline(folder, "train", str(config)).status == 0
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        (folder / f"r{rank}").mkdir()
        (folder / f"r{rank}" / "texts").symlink_to(folder / "texts")
        ranks.append(
            Command(
                folder / f"r{rank}",
                "train",
                str(config),
                f"train.output={folder}/torchrun",
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    assert [rank.end().status for rank in ranks] == [0, 0]
    assert learned(folder / "torchrun") == learned(folder / "whole")
    started = [(p["role"], p["replica"], p["rank"], p["pid"]) for p in processes(folder / "torchrun")]
    assert started == [("rank", 0, 0, ranks[0].pid), ("rank", 1, 0, ranks[1].pid)]


def test_complete_run_says_so(folder):
    config = tiny_config(folder)
    assert paceline(folder, "train", str(config)).status == 0
    again = paceline(folder, "train", str(config))
    assert again.status == 0 and "complete already" in again.out


def test_two_runs_in_one_folder_are_refused(folder):
    config = tiny_config(folder, train={"steps": 100000})
    command = Command(folder, "train", str(config))
    until_step(command, folder / "run", 1)
    (folder / "second").mkdir()
    second = paceline(
        folder / "second", "train", str(config), f"train.output={folder}/run", f"data.source={folder}/texts"
    )
    command.signal(signal.SIGTERM)
    command.end()
    assert second.status == 2 and f"in use by another run (process {command.pid})" in second.err


def test_dry_run_explains_without_starting_anything(folder):
    config = tiny_config(folder, replicas=2, batch={"sequences": 5})
    ended = paceline(folder, "train", str(config), "--dry-run", "--json")
    assert ended.status == 0, ended
    plan = ended.json()
    assert plan["batch"]["tokens"] == 160 and plan["batch"]["filling"] == 1
    assert plan["bytes_per_rank"]["master_weights"] == 4 * plan["model"]["parameters"]
    assert "3 of 5 sequences" in ended.out
    assert not (folder / "run").exists()
    assert yaml.safe_load(config.read_text())["replicas"] == 2


@pytest.mark.parametrize(("override", "rows"), [((), 8192), (("data.vocabulary=500",), 500)])
def test_dry_run_counts_the_vocabulary_that_a_run_would_train(folder, override, rows):
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "tie_word_embeddings": True}
    config = tiny_config(folder)
    model = f"model={json.dumps({'config': llama})}"
    plan = paceline(folder, "train", str(config), model, *override, "--dry-run", "--json").json()
    assert plan["model"]["vocabulary"] == rows
    assert plan["model"]["parameters"] == rows * 16 + 4 * 16**2 + 3 * 16 * 32 + 3 * 16
