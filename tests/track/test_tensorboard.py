from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator

from paceline.track.tensorboard import HELD_OUT_TAGS, TAGS, TensorBoard
from track.runs import metrics_of


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(point.step, point.value) for point in read.Scalars(tag)]


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    read = PluginEventAccumulator(str(folder)).Reload()
    return [(point.step, point.tensor_proto.string_val[0].decode()) for point in read.Tensors(tag)]


def test_scalars_come_back_at_their_steps_while_the_file_is_open(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.step(metrics_of(1))
    board.step(metrics_of(2) | {"mfu": None, "loss_scale": 4.0, "skipped_steps": 1})
    board.evaluation({"step": 2, "loss": 2.5, "bits_per_byte": None, "time": 1.0})
    assert points(tmp_path, "train/loss") == [
        (1, pytest.approx(metrics_of(1)["loss"])),
        (2, pytest.approx(metrics_of(2)["loss"])),
    ]
    assert points(tmp_path, "speed/mfu") == [(1, pytest.approx(0.31))]
    assert points(tmp_path, "held_out/loss") == [(2, 2.5)]
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert set(tags) == {*TAGS.values(), HELD_OUT_TAGS["loss"]}
    assert points(tmp_path, "train/loss_scale") == [(2, 4.0)], "where there is one"
    board.close()


def test_the_time_of_a_point_is_the_time_of_its_record(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.step(metrics_of(1))
    board.close()
    (point,) = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert point.wall_time == metrics_of(1)["time"]


def test_after_a_resume_no_point_stands_twice(tmp_path: Path) -> None:
    for start, end in [(0, 6), (4, 8)]:
        board = TensorBoard(tmp_path, start_step=start)
        for step in range(start + 1, end + 1):
            board.step(metrics_of(step) | {"loss": float(start)})
            sample = {"prompt": "p", "text": str(start)}
            board.evaluation({"step": step, "loss": 1.0, "time": 1.0, "samples": [sample]})
        board.close()
    assert points(tmp_path, "train/loss") == [(step, 0.0 if step <= 4 else 4.0) for step in range(1, 9)]
    assert texts(tmp_path, "samples/0") == [(step, "    p0" if step <= 4 else "    p4") for step in range(1, 9)]


def test_samples_come_back_as_a_block_that_markdown_leaves_alone(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    samples = [{"prompt": "def f():\n", "text": "    return\n```"}, {"prompt": "", "text": "<b>"}]
    board.evaluation({"step": 3, "loss": 1.0, "time": 1.0, "samples": samples})
    board.close()
    assert texts(tmp_path, "samples/0") == [(3, "    def f():\n        return\n    ```")]
    assert texts(tmp_path, "samples/1") == [(3, "    <b>")]


def test_a_write_that_fails_raises_at_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.close()
    with pytest.raises(ValueError, match="closed file"):
        board.step(metrics_of(1))
