"""A whole run of every family that the support table names, in each precision."""

from pathlib import Path

import pytest
import yaml

import paceline
from commands import tiny_config, write_texts
from paceline.models.tiny import TINY

OBJECTIVES = {"causal": "next_token", "masked": "masked", "seq2seq": "seq2seq"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure", "fp16"])
@pytest.mark.parametrize("family", TINY)
def test_a_family_trains_resumes_and_is_measured(family, precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    head, settings = TINY[family]
    model = {"config": {**settings, "vocab_size": 400}}
    tree = yaml.safe_load(tiny_config(tmp_path).read_text())
    tree |= {"model": model, "objective": OBJECTIVES[head], "precision": precision, "layout": {"recompute": "full"}}
    tree["track"]["display"] = "none"
    losses = []
    for steps in (4, 12):
        tree["train"]["steps"] = steps
        with paceline.Trainer(tree) as trainer:
            assert trainer.step == len(losses)
            losses += [event.loss for event in trainer.steps()]
            assert trainer.evaluate().loss < 1.1 * losses[0]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
