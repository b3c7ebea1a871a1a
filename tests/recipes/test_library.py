import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import paceline
from commands import metrics, tiny_config, write_texts
from paceline.config import read_tree
from paceline.errors import PlanError
from paceline.train.replica import holding


class Bigram(nn.Module):
    """The least a model can be: logits from the token itself."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree = read_tree(tiny_config(tmp_path))
    del tree["model"]
    return tree | {"data": {"source": "texts", "document": "paragraph", "vocabulary": 300}}


def test_a_module_of_the_users_own_in_the_users_own_loop(config, tmp_path):
    seen = []
    with paceline.Trainer(config, model=Bigram(300), hooks=(seen.append,)) as trainer:
        losses = [event.loss for event in trainer.steps()]
        measured = trainer.evaluate()
    assert losses[0] == pytest.approx(torch.log(torch.tensor(300.0)).item(), rel=1e-5)
    assert losses[-1] < losses[0] - 0.02
    assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]
    assert measured.bits_per_byte is not None and measured.bits_per_byte > 0
    assert len(metrics(tmp_path / "run")) == 6


def test_a_loop_left_early_continues_where_it_saved(config):
    whole = {**config, "train": {"steps": 6, "output": "whole"}}
    with paceline.Trainer(whole, model=Bigram(300)) as trainer:
        expected = [event.loss for event in trainer.steps()]
    got = []
    with paceline.Trainer(config, model=Bigram(300)) as trainer:
        for event in trainer.steps():
            got.append(event.loss)
            if event.step == 2:
                trainer.save()
                break
    with paceline.Trainer(config, model=Bigram(300)) as trainer:
        assert trainer.step == 2
        got += [event.loss for event in trainer.steps()]
    assert got == expected


def test_what_an_optimizer_averages_is_evaluated_and_given_away(config):
    averaging = {**config, "optimizer": {"name": "schedule_free_adamw", "lr": 0.1}, "schedule": "constant"}
    with paceline.Trainer(averaging, model=Bigram(300)) as trainer:
        assert all(event.loss > 0 for event in trainer.steps())
        loop, replica = trainer._loop, trainer._loop.parts.built.replica
        measure = loop.parts.evaluator.measure
        table = trainer.model.table.weight
        raw, learned = measure(6, loop._total).loss, table.detach().float().clone()
        with holding(replica, replica.averages()):
            averaged = measure(6, loop._total).loss
        assert trainer.evaluate().loss == averaged != raw
        assert torch.equal(table.detach().float(), learned), "and training goes on where it was"
        given = loop.weights()["table.weight"]
        assert torch.equal(given, replica.averages()["table.weight"]) and not torch.equal(given, learned)


def test_an_error_in_the_users_loop_comes_out_and_is_recorded(config, tmp_path):
    def stumble(event: paceline.StepEvent) -> None:
        raise ValueError("of the user's own")

    def loop() -> None:
        with paceline.Trainer(config, model=Bigram(300)) as trainer:
            for event in trainer.steps():
                stumble(event)

    with pytest.raises(ValueError, match="of the user's own"):
        loop()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["kind"], events[-1]["step"], events[-1]["message"]) == ("error", 1, "of the user's own")


def test_a_folder_serves_one_run_at_a_time(config):
    with paceline.Trainer(config, model=Bigram(300)), pytest.raises(PlanError, match="in use by another run"):
        paceline.Trainer(config, model=Bigram(300))
    with paceline.Trainer(config, model=Bigram(300)) as trainer:
        assert trainer.step == 0, "it is free again"


def test_replicas_need_processes(config):
    with pytest.raises(PlanError, match="torchrun --nproc-per-node 2"):
        paceline.Trainer({**config, "replicas": 2}, model=Bigram(300))


def test_a_model_is_needed(config):
    with pytest.raises(PlanError, match=r"set model\.config, model\.preset or model\.path, or pass a module"):
        paceline.Trainer(config)


def test_import_is_light():
    code = "import sys, json, paceline, paceline.cli; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "numpy", "transformers", "pydantic", "yaml", "pyarrow"} & set(loaded)


def test_public_names():
    assert paceline.__all__ == ["Config", "PacelineError", "StepEvent", "Trainer", "__version__", "read", "run"]
    assert all(getattr(paceline, name) is not None for name in paceline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = paceline.trian
