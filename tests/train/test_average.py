"""Averages of the weights against torch's own, and their way into the weights' place and back."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paceline import registry
from paceline.comm.mesh import Mesh
from paceline.config import choose
from paceline.errors import PlanError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.train.average import Average, check_statistics
from paceline.train.replica import ModuleReplica, holding

STEPS = 12


def replica_of(dtype: torch.dtype) -> tuple[nn.Module, ModuleReplica]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).to(torch.promote_types(dtype, torch.float32))
    return model, ModuleReplica(Masters(model, dtype), SGD(), mesh=Mesh.alone())


def trained(options, dtype=torch.float64, steps=STEPS, watch=None):
    """An average over some steps in which the weights move; ``watch`` is told each model after a step."""
    model, replica = replica_of(dtype)
    average = Average(choose(registry.AVERAGES, options), replica)
    for step in range(1, steps + 1):
        for i, shard in enumerate(replica.shards):
            shard.local.add_(torch.from_numpy(np.random.default_rng([step, i]).normal(size=shard.local.shape)))
        replica.refresh()
        average.stepped(step, ends_cycle=step % 5 == 0)
        if watch:
            watch(step, model)
    return average, model, replica


def same(average, reference):
    for name, value in reference.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], value.detach(), rtol=1e-12, atol=0)


def test_ema_without_a_warm_start_is_torch_s():
    model, _ = replica_of(torch.float64)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    average, *_ = trained(
        {"name": "ema", "decay": 0.7, "warm_start": False}, watch=lambda step, model: reference.update_parameters(model)
    )
    same(average, reference)
    assert average.taken == STEPS


def test_swa_of_the_cycle_ends_is_torch_s():
    model, _ = replica_of(torch.float64)
    reference = AveragedModel(model)
    average, *_ = trained("swa", watch=lambda step, m: reference.update_parameters(m) if step % 5 == 0 else None)
    same(average, reference)
    assert average.taken == 2


def test_a_warm_start_forgets_the_first_weights():
    weights = []
    average, *_ = trained({"name": "ema", "decay": 0.6}, watch=lambda _, m: weights.append(m.weight.detach().clone()))
    expected = weights[0]
    for m, weight in enumerate(weights[1:], start=1):
        decay = min(0.6, (1 + m) / (10 + m))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.tensors["weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("every", "start", "expected"), [(1, 0, 12), (3, 0, 4), (3, 5, 2), (1, 11, 1), ("cycle", 5, 1)]
)
def test_which_weights_are_taken(every, start, expected):
    average, *_ = trained({"name": "swa", "every": every, "start": start})
    assert average.taken == expected


@pytest.mark.parametrize("name", list(registry.AVERAGES))
def test_every_average_begins_with_the_first_weights_and_stays_between_those_taken(name):
    options = choose(registry.AVERAGES, name)
    if options.keeps:
        assert options.weight(0) == 1.0
        assert all(0 < options.weight(taken) < 1 for taken in range(1, 5000))
    else:
        average, *_ = trained(name)
        assert not average.tensors and not average.is_measured and not average.is_exported and average.taken == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_measured_in_the_weights_place_and_they_come_back_bit_for_bit(dtype):
    average, model, replica = trained("ema", dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = [shard.local.clone() for shard in replica.shards]
    mean = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with holding(replica, average.measured):
        for name, p in model.named_parameters():
            assert (
                p.dtype is dtype and torch.equal(p.detach(), mean[name].to(dtype)) and not torch.equal(p, before[name])
            )
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(shard.local, master) for shard, master in zip(replica.shards, masters, strict=True))
    assert all(torch.equal(average.tensors[name], mean[name]) for name in mean)


def test_they_come_back_after_an_error_too():
    average, model, replica = trained("ema")
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), holding(replica, average.measured):
        raise KeyError
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("options", [{"name": "ema", "evaluate": False}, {"name": "ema", "start": STEPS}])
def test_without_one_or_where_it_is_not_asked_for_the_weights_themselves_are_measured(options):
    average, model, replica = trained(options)
    before = model.weight.detach().clone()
    with holding(replica, average.measured):
        assert torch.equal(model.weight, before)


def test_another_kind_begins_anew():
    average, _, replica = trained("ema")
    for name, goes_on in (("ema", True), ("swa", False), ("none", False)):
        other = Average(choose(registry.AVERAGES, name), replica)
        assert bool(other.restored(average.values())) is goes_on
        assert other.taken == (STEPS if goes_on else 0)
        assert not other.restored(None)


def test_running_statistics_are_refused():
    check_statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    with pytest.raises(PlanError, match="average: 1 keeps running statistics"):
        check_statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
