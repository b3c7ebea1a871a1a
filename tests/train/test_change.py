"""The largest relative change of a tensor, alone and cut over ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.train.change import Changes
from paceline.train.replica import ModuleReplica


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].bias)
    model[1].bias.requires_grad_(False)
    return model


def changes(model: nn.Module) -> tuple[Changes, ModuleReplica]:
    replica = ModuleReplica(Masters(model, torch.float64), SGD(), mesh=Mesh.alone())
    return Changes(replica, [name for name, p in model.named_parameters() if p.requires_grad]), replica


def test_it_is_the_largest_of_all_tensors_relative_to_each_tensor_s_own_norm():
    found, replica = changes(small())
    before = {shard.name: shard.local.numpy().copy() for shard in replica.shards}
    with found.measured():
        for i, shard in enumerate(replica.shards):
            shard.local.add_(torch.full_like(shard.local, 0.01 * (i + 1)))
    moved = {
        shard.name: np.linalg.norm(shard.local.numpy() - before[shard.name]) / np.linalg.norm(before[shard.name])
        for shard in replica.shards
        if before[shard.name].any()
    }
    assert moved.keys() == {"0.weight", "1.weight"}, "a tensor of zeros has no relative change"
    assert found.largest == pytest.approx(max(moved.values()), rel=1e-12)


def test_what_was_measured_before_is_forgotten():
    found, replica = changes(small())
    for factor in (3.0, 1.0, 1.5):
        with found.measured():
            for shard in replica.shards:
                shard.local.mul_(factor)
        assert found.largest == pytest.approx(factor - 1, abs=1e-12)


def test_norms_of_weights_in_bf16_are_not_rounded_to_it():
    """With 8 bits for a norm a change of a hundredth would be known badly, and cut otherwise it would be another."""
    model = small().float()
    replica = ModuleReplica(Masters(model, torch.bfloat16, pure=True), SGD(), mesh=Mesh.alone(), rounding_seed=0)
    found = Changes(replica, [shard.name for shard in replica.shards])
    before = {shard.name: shard.local.double() for shard in replica.shards}
    with found.measured():
        for shard in replica.shards:
            shard.local.mul_(1.01)
    moved = [
        float((shard.local.double() - before[shard.name]).norm() / before[shard.name].norm())
        for shard in replica.shards
        if before[shard.name].any()
    ]
    assert found.largest == pytest.approx(max(moved), rel=1e-6)
