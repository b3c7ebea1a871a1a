"""Models in which sequences see each other: right in one process, refused wherever the work is shared."""

import pytest
import torch
from torch import nn

from paceline.config import Config
from paceline.errors import PlanError
from paceline.models.tiny import TINY
from paceline.objectives.base import Batch
from paceline.parallel.batch_statistics import check_batch_statistics
from paceline.plan.run import plan_run


class Norm(nn.Module):
    """A user's: an embedding, a norm, a head."""

    def __init__(self, norm):
        super().__init__()
        self.table, self.norm, self.drop, self.head = nn.Embedding(50, 8), norm, nn.Dropout(0.5), nn.Linear(8, 50)

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        return self.head(self.drop(self.norm(hidden.transpose(1, 2)).transpose(1, 2)))


class Centred(nn.Module):
    """Statistics over the batch without a module that is known for it."""

    def forward(self, hidden):
        return hidden - hidden.mean(0, keepdim=True)


def sample():
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    return Batch(inputs={"input_ids": ids, "use_cache": False}, labels=ids, count=24, sequences=(0, 1))


def check(model, **sections):
    batch = {"sequences": 4, "sequence_tokens": 12} | sections.pop("batch", {})
    config = Config.parse({"data": {"source": "x"}, "train": {"steps": 1}, "batch": batch} | sections)
    _, plan = plan_run(config)
    check_batch_statistics(model, sample(), config, plan)


SHARED = {
    "replicas=2": {"replicas": 2},
    "layout.shard=2": {"layout": {"shard": 2}},
    "layout.context=2": {"layout": {"context": 2}},
    "layout.tensor=2": {"layout": {"tensor": 2}},
    "layout.pipeline=2": {"layout": {"pipeline": 2}},
    "layout.recompute=full": {"layout": {"recompute": "full"}},
    "batch.micro=2": {"batch": {"micro": 2}},
    "batch.micro=auto": {"batch": {"micro": "auto"}},
}


@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), Centred()], ids=lambda n: type(n).__name__)
def test_it_is_refused_wherever_the_work_is_shared(norm, how):
    model = Norm(norm).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(PlanError, match=rf"^{how}: in norm the sequences of a micro-batch see each other"):
        check(model, **SHARED[how])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.norm.training


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), Centred()], ids=lambda n: type(n).__name__)
def test_one_forward_pass_of_the_whole_batch_is_what_it_says(norm):
    check(Norm(norm))
    check(Norm(norm), batch={"micro": 4})


@pytest.mark.parametrize("how", SHARED)
def test_sequences_that_do_not_see_each_other_may_be_shared(how):
    """Also where a norm of single sequences drops out: it draws the same beside any other."""
    for norm in (nn.GroupNorm(2, 8), nn.Identity()):
        check(Norm(norm), **SHARED[how])


class Frozen(nn.BatchNorm1d):
    """Stays with the statistics that it has."""

    def train(self, mode=True):
        return super().train(False)


def test_frozen_statistics_are_numbers_like_others():
    check(Norm(Frozen(8)), replicas=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_families_pass(family):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    head, settings = TINY[family]
    kind = AutoModelForCausalLM if head == "causal" else AutoModelForMaskedLM
    check(
        kind.from_config(
            AutoConfig.for_model(settings["model_type"], **{k: v for k, v in settings.items() if k != "model_type"})
        ),
        replicas=2,
    )
