import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paceline.checkpoint import Checkpoint, load, newest, steps, tensor_state
from paceline.checkpoint.manifest import Manifest
from paceline.errors import CheckpointError

Save = Callable[..., Checkpoint]


@pytest.fixture
def run(save: Save, tmp_path: Path) -> Path:
    """Steps 100, 200 and 300 of a run of four ranks."""
    for step in (100, 200, 300):
        save(
            [{f"model/{r}": tensor_state(torch.full((8, 4), float(step + r)))} for r in range(4)],
            step=step,
            values={"lr": 0.1},
            keep=9,
        )
    return tmp_path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def message(folder: Path, step: int = 300) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, step).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_run_verifies(run: Path) -> None:
    assert steps(run) == [100, 200, 300]
    assert newest(run) == 300
    for step in steps(run):
        load(run, step).verify()


@pytest.mark.parametrize("at", [0, 3, 40, -1, -70])
def test_a_flipped_bit_names_its_file_and_the_newest_good_step(run: Path, at: int) -> None:
    flip(run / "step-00000300" / "rank-00002.safetensors", at)
    flip(run / "step-00000200" / "rank-00000.safetensors", at)
    text = message(run)
    assert text.startswith(f"{run}/step-00000300/rank-00002.safetensors is damaged: sha256 ")
    assert text.endswith("The newest good step is 100: resume from it with checkpoint.resume=100.")


def test_a_damaged_header_is_an_error_when_read_too(run: Path) -> None:
    flip(run / "step-00000300" / "rank-00002.safetensors", 7)
    with pytest.raises(CheckpointError, match=r"rank-00002\.safetensors is damaged"):
        load(run, 300).tensor("model/2")


def test_missing_files_are_counted_and_named(run: Path) -> None:
    (run / "step-00000300" / "rank-00001.safetensors").unlink()
    (run / "step-00000300" / "rank-00003.safetensors").unlink()
    assert message(run) == (
        "step 300 has 2 of 4 shard files (missing: rank-00001.safetensors, rank-00003.safetensors). "
        "The newest complete step is 200: resume from it with checkpoint.resume=200."
    )


def test_a_file_cut_short_is_seen_without_reading_it(run: Path) -> None:
    path = run / "step-00000300" / "rank-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 10)
    assert message(run).startswith(f"{path} has {size - 10} bytes, expected {size}. The newest complete step is 200")


def test_a_file_lost_after_loading(run: Path) -> None:
    checkpoint = load(run, 300)
    (run / "step-00000300" / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors cannot be read: No such file"):
        checkpoint.verify()
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is damaged: No such file"):
        checkpoint.tensor("model/1")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_manifest_cut_short(run: Path, share: float) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.write_text(path.read_text()[: int(len(path.read_text()) * share)])
    text = message(run)
    assert text.startswith(f"{path} cannot be used: it is not valid JSON at line ")
    assert text.endswith("checkpoint.resume=200.")


def test_a_changed_digit_in_the_manifest(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    assert "its checksum does not match its content" in message(run)


def test_a_manifest_that_is_not_text(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.write_bytes(b"\xff\xfe\x00" * 9)
    assert f"{path} cannot be used" in message(run)


def test_a_manifest_that_is_something_else(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.write_text("[1, 2]")
    assert "it names no format" in message(run)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_manifest_with_a_wrong_type(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    whole = Manifest.parse(path.read_text())
    path.write_text(whole.model_copy(update={"layout": {"replicas": "many"}}).text())
    assert f"{path} is damaged: layout.replicas: input should be a valid integer" in message(run)


def test_a_newer_format_is_refused(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert "it is of format 2, this paceline reads up to 1; install a newer one" in message(run)


def test_no_manifest(run: Path) -> None:
    (run / "step-00000300" / "manifest.json").unlink()
    assert message(run).startswith(
        f"step 300 has no manifest.json in {run}/step-00000300. The newest complete step is 200"
    )


def test_an_unreadable_manifest(run: Path) -> None:
    path = run / "step-00000300" / "manifest.json"
    path.unlink()
    path.mkdir()
    assert message(run).startswith(f"{path} cannot be read: Is a directory.")


def test_nothing_good_is_left(run: Path) -> None:
    shutil.rmtree(run / "step-00000100")
    for step in (200, 300):
        flip(run / f"step-{step:08d}" / "rank-00000.safetensors", -1)
    assert message(run).endswith("No other step there is good: start anew in another train.output.")


def test_a_step_that_was_never_saved(run: Path) -> None:
    assert message(run, 150) == f"there is no checkpoint of step 150 in {run}; steps there: 100, 200, 300"
    assert (
        message(run / "nowhere", 150) == f"there is no checkpoint of step 150 in {run}/nowhere; no step is saved there"
    )


def test_no_folder_holds_no_step(tmp_path: Path) -> None:
    assert steps(tmp_path / "nowhere") == []
    assert newest(tmp_path / "nowhere") is None
