"""Runs under layouts, from the command line: what they learn, what they save, and where it goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from commands import metrics, paceline, tiny_config, write_texts
from tolerances import FP32_LOSS, FP32_RUN

SGD = (
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "schedule={name: constant}",
    "precision=fp32",
    "train.steps=6",
    "checkpoint.every=3",
    "model.config.attention_dropout=0.1",
)


def losses(folder):
    return [record["loss"] for record in metrics(folder / "run")]


def ran(folder, *overrides):
    if not (folder / "texts").exists():
        write_texts(folder)
    ended = paceline(folder, "train", str(tiny_config(folder)), *SGD, *overrides)
    assert ended.status == 0, ended
    return ended


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    ran(folder)
    return losses(folder), load_file(folder / "run" / "export" / "model.safetensors")


PATHS = {
    "shards to a pipeline": (["layout.shard=2", "layout.tensor=2"], ["layout.pipeline=2", "batch.micro=1"]),
    "a pipeline to context and replicas": (
        ["layout.pipeline=2", "layout.schedule=gpipe", "batch.micro=1"],
        ["layout.context=2", "replicas=2"],
    ),
    "tensor and sequence to one process": (["layout.tensor=2", "layout.sequence=true", "replicas=2"], []),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_run_goes_on_under_another_layout(tmp_path, one_process, path):
    first, then = PATHS[path]
    ran(tmp_path, *first, "train.steps=3")
    ran(tmp_path, *then)
    expected, weights = one_process
    assert losses(tmp_path) == pytest.approx(expected, rel=10 * FP32_LOSS)
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        error = torch.linalg.vector_norm(exported[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error <= FP32_RUN, name


MIXTURE = (
    "model.config.model_type=mixtral",
    "model.config.num_local_experts=4",
    "model.config.num_key_value_heads=1",
    "optimizer={name: adamw, lr: 0.01}",
)
DEALT = ["layout.shard=2", "layout.expert=2"]
IN_SLICES = ["layout.context=2", "layout.tensor=2", "layout.expert=2"]


@pytest.mark.slow
def test_a_mixture_goes_on_with_its_experts_elsewhere(tmp_path):
    """From whole experts on two ranks to slices of them on four, and to one process."""
    seen = {}
    for name, parts in {"alone": ([], [], []), "dealt": (DEALT, IN_SLICES, [])}.items():
        folder = tmp_path / name
        folder.mkdir()
        for steps, overrides in zip((2, 4, 6), parts, strict=True):
            ran(folder, *MIXTURE, *overrides, f"train.steps={steps}")
        seen[name] = losses(folder), load_file(folder / "run" / "export" / "model.safetensors")
    assert seen["dealt"][0] == pytest.approx(seen["alone"][0], rel=10 * FP32_LOSS)
    for name, tensor in seen["alone"][1].items():
        error = torch.linalg.vector_norm(seen["dealt"][1][name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error <= FP32_RUN, name


def test_a_run_of_several_ranks_goes_back_to_an_earlier_step(tmp_path, one_process):
    ran(tmp_path, "layout.shard=2", "layout.tensor=2")
    ran(tmp_path, "layout.shard=2", "layout.tensor=2", "checkpoint.resume=3")
    assert losses(tmp_path) == pytest.approx(one_process[0], rel=10 * FP32_LOSS)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*6")] == ["step-00000006"]


def test_the_folder_says_which_rank_is_where(tmp_path):
    ran(tmp_path, "layout.shard=2", "replicas=2", "train.steps=1")
    processes = json.loads((tmp_path / "run" / "processes.json").read_text())
    ranks = [(p["replica"], p["rank"]) for p in processes if p["role"] == "rank"]
    assert ranks == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_dry_run_says_what_each_rank_has(tmp_path):
    write_texts(tmp_path)
    ended = paceline(tmp_path, "train", str(tiny_config(tmp_path)), "layout.shard=2", "layout.tensor=2", "--dry-run")
    assert ended.status == 0, ended
    assert "rank 3  replica 0, shard 2 of 2, tensor 2 of 2" in ended.out
