import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint import (
    Checkpointer,
    LocalExchange,
    check_space,
    disk,
    load,
    needed_bytes,
    newest,
    steps,
    tensor_state,
)
from paceline.errors import CheckpointError


class Recorded(LocalExchange):
    """Notes what is posted and discarded, and lets a test act at that moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.posted: list[str] = []
        self.discarded: list[str] = []

    def post(self, key: str, value: str) -> None:
        self.posted.append(key)
        self.on_post(key, json.loads(value))
        super().post(key, value)

    def discard(self, key: str) -> None:
        self.discarded.append(key)
        super().discard(key)

    def on_post(self, key: str, value: dict[str, Any]) -> None:
        """To override."""


class Gate(Recorded):
    """Holds the writing back until ``opened`` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened = threading.Event()

    def on_post(self, key: str, value: dict[str, Any]) -> None:
        if "begin" in key:
            assert self.opened.wait(20)


class FullDisk(Recorded):
    """Puts /dev/full where a file of the second save is about to be written: a disk that is really full."""

    name = "rank-00000.safetensors"

    def on_post(self, key: str, value: dict[str, Any]) -> None:
        if key == "save-2/begin/0":
            (self.folder / value["folder"] / self.name).symlink_to("/dev/full")


class FullForManifest(FullDisk):
    name = "manifest.json"


def checkpointer(folder: Path, exchange: LocalExchange | None = None, **options: Any) -> Checkpointer:
    given = {"rank": 0, "ranks": 1, "layout": {}, "timeout_s": 20.0} | options
    return Checkpointer(folder, exchange=exchange or LocalExchange(), **given)


def state(value: float, n: int = 64) -> dict[str, Any]:
    return {"model/w": tensor_state(torch.full((n,), value))}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    weights = torch.full((64,), 1.0)
    with checkpointer(tmp_path, gate) as writer:
        writer.save(1, {"model/w": tensor_state(weights)}, {})
        assert newest(tmp_path) is None
        assert writer.poll() == []
        weights.fill_(2.0)  # the next optimizer step
        gate.opened.set()
        (saved,) = writer.wait()
    assert saved.step == newest(tmp_path) == 1
    assert torch.equal(load(tmp_path, 1).tensor("model/w"), torch.full((64,), 1.0))


def test_two_saves_are_never_written_at_once(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    writer = checkpointer(tmp_path, gate)
    writer.save(1, state(1), {})
    second = threading.Thread(target=writer.save, args=(2, state(2), {}))
    second.start()
    gate.opened.set()
    second.join()
    assert [saved.step for saved in writer.wait()] == [1, 2]
    assert gate.posted == [f"save-{n}/{moment}/0" for n in (1, 2) for moment in ("begin", "written", "end")]
    assert load(tmp_path, 1).tensor("model/w")[0] == 1


def test_the_exchange_does_not_fill_up(tmp_path: Path) -> None:
    exchange = Recorded(tmp_path)
    writers = [checkpointer(tmp_path, exchange, rank=rank, ranks=3) for rank in range(3)]
    for step in range(1, 6):
        for rank, writer in enumerate(writers):
            writer.save(step, {f"model/{rank}": tensor_state(torch.ones(4))}, {})
    for writer in writers:
        writer.wait()
    left = set(exchange.posted) - set(exchange.discarded)
    assert left == {"save-5/end/0"}
    assert len(exchange.posted) == 5 * 5


@pytest.mark.parametrize("exchange_class", [FullDisk, FullForManifest])
def test_a_full_disk(tmp_path: Path, exchange_class: type[FullDisk]) -> None:
    writer = checkpointer(tmp_path, exchange_class(tmp_path))
    writer.save(1, state(1), {})
    writer.wait()
    writer.save(2, state(2), {})
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    text = str(caught.value)
    assert text.startswith("step 2 was not saved (the newest complete step is 1): ")
    assert f"{exchange_class.name}: No space left on device (ENOSPC); free some space, keep fewer checkpoints" in text
    assert visible(tmp_path) == ["step-00000001"]
    load(tmp_path, 1).verify()
    writer.save(3, state(3), {})  # the error was told once; a later save may work again
    assert [saved.step for saved in writer.wait()] == [3]


@pytest.mark.parametrize("report", ["save", "poll", "wait", "close"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path, report: str) -> None:
    writer = checkpointer(tmp_path, FullDisk(tmp_path))
    writer.save(1, state(1), {})
    writer.save(2, state(2), {})
    for thread in threading.enumerate():
        if thread.name == "checkpoint-2":
            thread.join()
    call = {
        "save": lambda: writer.save(3, state(3), {}),
        "poll": writer.poll,
        "wait": writer.wait,
        "close": lambda: writer.__exit__(None, None, None),
    }[report]
    with pytest.raises(CheckpointError, match="ENOSPC"):
        call()
    assert [saved.step for saved in writer.poll()] == [1]


def test_an_error_on_its_way_is_not_replaced(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path, FullDisk(tmp_path))
    writer.save(1, state(1), {})
    writer.save(2, state(2), {})
    with pytest.raises(KeyError), writer:
        raise KeyError


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", range(5))
def test_an_error_at_any_sync_leaves_nothing_half_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: int
) -> None:
    writer = checkpointer(tmp_path)
    writer.save(1, state(1), {})
    writer.wait()
    calls = iter(range(100))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    writer.save(2, state(2), {})
    if call == 4:  # there are four: the shard file, the manifest, the new folder, the folder of all
        writer.wait()
        assert next(calls) == 4
        return
    with pytest.raises(CheckpointError, match=rf"cannot write {tmp_path}.*: {os.strerror(number)} \(E[A-Z]+\); \w+"):
        writer.wait()
    assert visible(tmp_path) == ["step-00000001"]


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file/checkpoints: Not a directory \(ENOTDIR\)"):
        checkpointer(tmp_path / "file" / "checkpoints")


def test_a_folder_that_vanished(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").rmdir()
    writer.save(1, state(1), {})
    with pytest.raises(
        CheckpointError, match=r"step 1 was not saved \(no step is saved\): .*No such file or directory"
    ):
        writer.wait()


def test_an_error_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    exchange = FullDisk(tmp_path)
    exchange.name = "rank-00002.safetensors"
    writers = [checkpointer(tmp_path, exchange, rank=rank, ranks=4) for rank in range(4)]
    for step in (1, 2):
        for rank, writer in enumerate(writers):
            writer.save(step, {f"model/{rank}": tensor_state(torch.ones(4))}, {})
    texts = set()
    for writer in writers:
        with pytest.raises(CheckpointError) as caught:
            writer.wait()
        texts.add(str(caught.value))
    (text,) = texts
    assert "rank 2: cannot write" in text
    assert visible(tmp_path) == ["step-00000001"]


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path, ranks=2, timeout_s=0.05)
    writer.save(1, state(1), {})
    with pytest.raises(CheckpointError, match=r"nothing came within 0\.05 s for save-1/written/1"):
        writer.wait()
    assert visible(tmp_path) == []


def test_ranks_at_different_steps(tmp_path: Path) -> None:
    exchange = LocalExchange()
    writers = [checkpointer(tmp_path, exchange, rank=rank, ranks=2) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.save(10 + rank, {f"model/{rank}": tensor_state(torch.ones(4))}, {})
    for writer in writers:
        with pytest.raises(CheckpointError, match="rank 1: it saves step 11 while rank 0 saves step 10"):
            writer.wait()
    assert visible(tmp_path) == []


def test_a_saved_step_is_never_written_over(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path)
    writer.save(7, state(1), {})
    with pytest.raises(CheckpointError, match=r"step 7 is saved already at .*step-00000007"):
        writer.save(7, state(2), {})
    assert load(tmp_path, 7).tensor("model/w")[0] == 1


def test_going_back_sets_the_later_steps_aside_until_they_are_passed(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path, keep=9)
    for step in (10, 20, 30):
        writer.save(step, state(step), {})
    assert writer.set_aside_after(10) == [30, 20]
    assert steps(tmp_path) == [10]
    assert visible(tmp_path) == ["abandoned-step-00000020", "abandoned-step-00000030", "step-00000010"]
    writer.save(20, state(-20), {})
    writer.wait()
    assert visible(tmp_path) == ["abandoned-step-00000030", "step-00000010", "step-00000020"]
    assert load(tmp_path, 20).tensor("model/w")[0] == -20
    assert writer.set_aside_after(20) == []
    writer.save(40, state(40), {})
    writer.wait()
    assert visible(tmp_path) == ["step-00000010", "step-00000020", "step-00000040"]


def test_going_back_twice(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path)
    for value in (1, 2):
        for step in (1, 2):
            if step not in steps(tmp_path):
                writer.save(step, state(value), {})
                writer.wait()
        assert writer.set_aside_after(1) == [2]
    assert visible(tmp_path) == ["abandoned-step-00000002", "step-00000001"]
    os.rename(tmp_path / "abandoned-step-00000002", tmp_path / "step-00000002")
    assert load(tmp_path, 2).tensor("model/w")[0] == 2


def test_old_steps_go_as_new_ones_come(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path, keep=2, keep_every=30)
    for step in range(10, 101, 10):
        writer.save(step, state(step), {})
    writer.wait()
    assert visible(tmp_path) == [f"step-{step:08d}" for step in (30, 60, 90, 100)]


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = checkpointer(tmp_path, keep=1)
    writer.save(1, state(1), {})
    writer.wait()

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        writer.save(2, state(2), {})
        assert [saved.step for saved in writer.wait()] == [2]
    assert "cannot remove an old checkpoint" in caplog.text
    assert steps(tmp_path) == [2]
    writer.save(3, state(3), {})
    writer.wait()
    assert visible(tmp_path) == ["step-00000003"]


def test_needed_bytes_and_space(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    tensors = {
        "a": tensor_state(shared),
        "b": tensor_state(shared),
        "c": tensor_state(torch.zeros(3, dtype=torch.bfloat16)),
        "d": tensor_state(torch.zeros(0)),
    }
    assert needed_bytes(tensors) == 4006
    check_space(tmp_path / "not" / "yet", 4006)
    with pytest.raises(CheckpointError, match=rf"needs 1048576\.0 GiB, [\d.]+ [GM]iB free at {tmp_path}; free some"):
        check_space(tmp_path / "not" / "yet", 2**50)


def test_a_real_full_device(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        disk.write_file(tmp_path / "file", [b"header", memoryview(bytes(100))])
    assert caught.value.filename == str(tmp_path / "file")
