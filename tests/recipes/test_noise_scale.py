"""The gradient-noise scale of a run, from the command line."""

from pathlib import Path

import pytest

from commands import paceline, tiny_config, write_texts
from tolerances import FP32_RUN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("noise")
    write_texts(made)
    assert paceline(made, "train", str(tiny_config(made))).status == 0
    return made


def noise(folder, *words):
    ended = paceline(folder, "noise-scale", str(tiny_config(folder)), "--batches", "4", "--json", *words)
    assert ended.status == 0, ended
    return ended


def contents(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_it_is_the_same_under_layouts_and_writes_nothing(folder):
    before = contents(folder / "run")
    one = noise(folder)
    found = one.json()
    assert found["step"] == 6 and found["batches"] == 4 and found["trace"] > 0
    assert "batch.sequences=4 is" in one.out or "Use more --batches" in one.out
    for layout in ("replicas=2", "layout.shard=2", "layout.tensor=2"):
        other = noise(folder, layout).json()
        for name in ("step", "gradient_square", "trace"):
            assert other[name] == pytest.approx(found[name], rel=FP32_RUN), (layout, name)
    assert contents(folder / "run") == before


def test_micro_batches_do_not_change_it_and_it_may_be_of_the_start(folder):
    found = [noise(folder, "train.output=none", word).json() for word in ("batch.micro=1", "batch.micro=4")]
    assert found[0]["step"] == found[1]["step"] == 0
    assert found[0]["trace"] == pytest.approx(found[1]["trace"], rel=FP32_RUN)
    assert not (folder / "none").exists()


def test_too_few_batches_are_refused(folder):
    ended = paceline(folder, "noise-scale", str(tiny_config(folder)), "--batches", "2")
    assert ended.status == 2 and "3" in ended.err


def test_replicas_that_learn_alone_have_no_one_gradient(folder):
    ended = paceline(folder, "noise-scale", str(tiny_config(folder, replicas=2, sync="diloco")))
    assert ended.status != 0 and "sync=diloco: replicas that learn alone are at places of their own" in ended.err
