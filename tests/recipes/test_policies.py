"""Going back when the loss leaps, and ending early: through the loop as users start it."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import commands
import paceline
from commands import metrics, tiny_config, write_texts
from paceline.checkpoint import steps
from paceline.config import read_tree
from paceline.errors import NonFiniteError, PlanError, TrainError
from paceline.evaluate.held_out import HeldOut
from tolerances import FP32_RUN

SEQUENCES = 4
STEPS = 40
EVERY = 5


class Bigram(nn.Module):
    """The least a model can be: logits from the token itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids):
        return self.table(input_ids)


class Trapped:
    """The objective of a config, whose loss is multiplied by ``factor`` for batches with some sequences, and is no
    number for others."""

    def __init__(self, sequences, factor=20.0, bad=()):
        self._sequences, self._factor, self._bad = set(sequences), factor, set(bad)

    def of(self, trainer):
        parts = trainer._loop.parts
        inner = parts.built.schedule._objective
        trap = self

        class Objective(type(inner)):
            def loss(self, model, batch):
                loss = super().loss(model, batch)
                if model.training and trap._bad & set(batch.sequences):
                    return loss * math.nan
                return loss * trap._factor if model.training and trap._sequences & set(batch.sequences) else loss

        inner.__class__ = Objective
        return trainer


@pytest.fixture
def config(tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree = read_tree(tiny_config(tmp_path))
    del tree["model"]
    return tree | {
        "data": {"source": "texts", "document": "paragraph", "vocabulary": 300},
        "batch": {"sequences": SEQUENCES, "sequence_tokens": 16},
        "optimizer": {"name": "adamw", "lr": 0.02},
        "train": {"steps": STEPS, "output": "run"},
        "checkpoint": {"every": EVERY},
        "spikes": {"window": 10},
    }


def events(tmp_path, kind):
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def table(trainer):
    return trainer.model.table.weight.detach().clone()


def of_step(step):
    """The sequences of a step of a run that has left none out."""
    return range((step - 1) * SEQUENCES, step * SEQUENCES)


def trained(config, trap, until=STEPS):
    with paceline.Trainer(config, model=Bigram()) as trainer:
        losses = []
        for event in trap.of(trainer).steps():
            losses.append((event.step, event.loss))
            if event.step == until:
                break
        return table(trainer), losses, trainer._loop.sequences_seen


def test_a_leap_is_undone_its_batches_are_left_out_and_it_is_told(config, tmp_path):
    trap = Trapped(of_step(18))
    weights, losses, seen = trained(config, trap)
    assert [step for step, _ in losses] == [*range(1, 19), *range(16, STEPS + 1)]
    assert losses[17][1] > 5 * losses[16][1]
    assert seen == (STEPS + 3) * SEQUENCES, "the batches of steps 16 to 18 are past"
    told = events(tmp_path, "rollback")
    assert len(told) == 1 and told[0]["step"] == 18 and told[0]["to"] == 15
    assert "leapt to" in told[0]["message"] and "sequences 60 to 71 are left out" in told[0]["message"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(1, STEPS + 1)], "each step stands once"
    assert max(line["loss"] for line in metrics(tmp_path / "run")) < 1.1 * losses[0][1]
    assert torch.equal(weights, without(config, {16: 3 * SEQUENCES})), "as if these batches had never been there"


def without(config, left_out):
    """The weights of a run that leaves sequences out before some steps, without watching."""
    config = {**config, "spikes": None, "train": {"steps": STEPS, "output": "plain"}}
    with paceline.Trainer(config, model=Bigram()) as trainer:
        for event in trainer.steps():
            trainer._loop.sequences_seen += left_out.get(event.step + 1, 0)
        return table(trainer)


def test_a_run_that_went_back_is_resumed_bit_for_bit(config):
    weights, losses, _ = trained(config, Trapped(of_step(18)))
    again = {**config, "train": {"steps": STEPS, "output": "again"}}
    trained(again, Trapped(of_step(18)), until=27)
    resumed, rest, _ = trained(again, Trapped(of_step(18)))
    assert rest == losses[-len(rest) :] and rest[0][0] == 26
    assert torch.equal(resumed, weights)


def test_patience_waits_for_more_leaps_and_skip_leaves_more_out(config, tmp_path):
    config["spikes"] = {"window": 10, "patience": 2, "skip": 3}
    trap = Trapped([*of_step(13), *of_step(20), *of_step(21)])
    _, losses, seen = trained(config, trap)
    told = events(tmp_path, "rollback")
    assert [(event["step"], event["to"]) for event in told] == [(21, 15)], "one leap alone is none"
    assert seen == (STEPS + 6 + 3) * SEQUENCES
    assert [step for step, _ in losses] == [*range(1, 22), *range(16, STEPS + 1)]


def test_a_checkpoint_made_during_a_leap_is_not_gone_back_to(config, tmp_path):
    config["spikes"] = {"window": 10, "patience": 2}
    trained(config, Trapped([*of_step(20), *of_step(21)]))
    assert [(event["step"], event["to"]) for event in events(tmp_path, "rollback")] == [(21, 15)]
    assert steps(tmp_path / "run" / "checkpoints") == [30, 35, 40]


def test_what_is_not_a_number_is_gone_back_from_and_is_an_error_without(config, tmp_path):
    trap = Trapped(of_step(12), factor=math.nan)
    weights, losses, seen = trained(config, trap)
    (told,) = events(tmp_path, "rollback")
    assert told["to"] == 10 and "loss is nan at step 12" in told["message"]
    assert seen == (STEPS + 2) * SEQUENCES and all(math.isfinite(loss) for _, loss in losses)
    assert torch.equal(weights, without(config, {11: 2 * SEQUENCES}))
    config |= {"spikes": None, "train": {"steps": STEPS, "output": "plain2"}}
    with pytest.raises(NonFiniteError, match="loss is nan at step 12"):
        trained(config, trap)


def test_what_is_not_a_number_after_a_leap_is_not_gone_back_from_to_the_leap(config, tmp_path):
    config["spikes"] = {"window": 10, "patience": 3}
    trained(config, Trapped(of_step(20), bad=of_step(21)))
    assert [(event["step"], event["to"]) for event in events(tmp_path, "rollback")] == [(20, 15)]


def test_it_gives_up_in_the_end(config):
    with pytest.raises(TrainError, match=r"leapt 4 times after step 15, and spikes\.most=3"):
        trained(config, Trapped(range(17 * SEQUENCES, 1000)))


def test_a_leap_before_the_first_checkpoint_is_an_error(config):
    config["checkpoint"] = {"every": 30}
    with pytest.raises(TrainError, match=r"no checkpoint before it .* smaller checkpoint\.every than 30"):
        trained(config, Trapped(of_step(18)))


def test_what_has_nothing_to_go_by_is_refused(config):
    with pytest.raises(PlanError, match=r"checkpoint\.every=0 saves none"):
        trained({**config, "checkpoint": {}}, Trapped([]))
    with pytest.raises(PlanError, match=r"early_stop follows the held-out loss, but evaluate\.every=0"):
        trained({**config, "early_stop": {}}, Trapped([]))


def measures(monkeypatch, losses):
    """Have these held-out losses take the place of those that are measured, by step."""
    measure = HeldOut.measure
    monkeypatch.setattr(
        HeldOut, "measure", lambda self, step, total: replace(measure(self, step, total), loss=losses[step])
    )


HELD_OUT = {4: 3.0, 8: 2.0, 12: 2.5, 16: 1.95, 20: 2.2, 24: 2.1, 28: 1.0, 40: 0.5}


@pytest.mark.parametrize(
    ("options", "end", "best"),
    [({"patience": 2}, 24, 16), ({"patience": 2, "least": 0.1}, 16, 8), ({"patience": 9}, 40, 40)],
)
def test_a_run_ends_when_nothing_is_better_with_the_best_weights(config, tmp_path, monkeypatch, options, end, best):
    config |= {"spikes": None, "early_stop": options, "evaluate": {"every": 4}, "checkpoint": {"every": 10, "keep": 1}}
    losses = dict.fromkeys((32, 36), 0.9) | HELD_OUT | ({32: 0.8, 36: 0.7} if end == 40 else {})
    kept = {}
    measures(monkeypatch, losses)
    with paceline.Trainer(config, model=Bigram()) as trainer:
        for event in trainer.steps():
            kept[event.step] = table(trainer)
        assert max(kept) == end and trainer.step == best and trainer._loop.is_done
        assert torch.equal(table(trainer), kept[best])
    if end < STEPS:
        (told,) = events(tmp_path, "stop")
        assert f"of step {best} in 2 measurements: ended after step {end}; the weights are those" in told["message"]
        with paceline.Trainer(config, model=Bigram()) as trainer:  # once more: it is over
            assert list(trainer.steps()) == [] and torch.equal(table(trainer), kept[best])
        config["early_stop"] = {**options, "patience": 3}  # who waits longer goes on where it ended
        with paceline.Trainer(config, model=Bigram()) as trainer:
            assert next(trainer.steps()).step == end + 1
    assert [line["step"] for line in metrics(tmp_path / "run")][:end] == [*range(1, end + 1)]


LEAPING = {
    "batch": {"sequences": 4, "sequence_tokens": 32},
    "train": {"steps": 40},
    "optimizer": {"name": "adamw", "lr": 0.02},
    "schedule": "constant",
    "checkpoint": {"every": 5},
    "spikes": {"window": 10, "threshold": 5.0, "most": 9},
}


def leaping(folder, *overrides):
    """A run on text of which a few paragraphs are noise; its rollbacks, and the losses that stayed."""
    write_texts(folder)
    drawn = random.Random(0)
    noise = ["".join(chr(drawn.randrange(0x4E00, 0x9000)) for _ in range(12)) for _ in range(6)]
    (folder / "texts" / "z.txt").write_text("\n\n".join(noise))
    ended = commands.paceline(folder, "train", str(tiny_config(folder, **LEAPING)), *overrides)
    assert ended.status == 0, ended
    told = [(event["step"], event["to"], event["message"].partition(":")[2]) for event in events(folder, "rollback")]
    return told, [line["loss"] for line in metrics(folder / "run")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return leaping(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("layout", ["replicas=2", "layout.shard=2", "layout.pipeline=2 layout.tensor=2 batch.micro=1"])
def test_every_layout_goes_back_at_the_same_steps(alone, tmp_path, layout):
    told, losses = leaping(tmp_path, *layout.split())
    assert len(told) >= 3 and told == alone[0]
    assert losses == pytest.approx(alone[1], rel=FP32_RUN)
