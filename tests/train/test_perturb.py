"""Shrink and perturb, against the paper's formula with values that the model's family draws."""

import hashlib

import pytest
import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.config import ModelConfig, PerturbConfig
from paceline.errors import PlanError
from paceline.models.source import ModelSource
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.train.perturb import Perturb
from paceline.train.replica import ModuleReplica

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
CONFIG = PerturbConfig(at=(2, 4), shrink=0.4, noise=0.3)


def llama(seed: int = 0) -> nn.Module:
    return ModelSource.of(ModelConfig(config=LLAMA), "causal").build(seed)


def seed_of(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/perturb/{step}".encode(), digest_size=8).digest(), "big") >> 1


def perturbed(model: nn.Module, step: int, *, seed: int = 7, config: PerturbConfig = CONFIG, ends_cycle: bool = False):
    """Whether it was done, and the weights before and after."""
    perturb = Perturb(config, model, seed=seed, steps=10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replica = ModuleReplica(Masters(model, torch.float32), SGD(), mesh=Mesh.alone())
    done = perturb.stepped(step, replica, ends_cycle=ends_cycle)
    return done, before, {name: p.detach() for name, p in model.named_parameters()}


def test_weights_are_shrunk_and_a_part_of_new_first_values_is_added():
    done, before, after = perturbed(llama(), 4)
    fresh = dict(llama(seed_of(7, 4)).named_parameters())
    assert done and after.keys() == before.keys() == fresh.keys()
    for name in before:
        torch.testing.assert_close(after[name], 0.4 * before[name] + 0.3 * fresh[name].detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(fresh[name], before[name]) or "norm" in name


def test_each_step_and_seed_draws_its_own_values_and_always_the_same():
    values = [perturbed(llama(), step, seed=seed)[2] for step, seed in ((2, 7), (4, 7), (2, 8), (2, 7))]
    weight = [value["model.layers.1.mlp.up_proj.weight"] for value in values]
    assert torch.equal(weight[0], weight[3])
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


@pytest.mark.parametrize(
    ("at", "step", "ends_cycle", "expected"),
    [
        ((2, 4), 3, True, False),
        ((2, 4), 2, False, True),
        ("cycle", 3, True, True),
        ("cycle", 3, False, False),
        ("cycle", 10, True, False),
    ],
)
def test_it_is_done_after_the_steps_named_and_never_after_the_last(at, step, ends_cycle, expected):
    config = PerturbConfig(at=at, shrink=0.5, noise=0.5)
    done, before, after = perturbed(llama(), step, config=config, ends_cycle=ends_cycle)
    assert done is expected
    assert all(torch.equal(before[name], after[name]) is not expected for name in before if "norm" not in name)


def test_the_copy_that_computes_follows():
    model = llama()
    perturb = Perturb(CONFIG, model, seed=0, steps=10)
    replica = ModuleReplica(Masters(model, torch.bfloat16), SGD(), mesh=Mesh.alone())
    perturb.stepped(2, replica, ends_cycle=False)
    for shard in replica.shards:
        assert torch.equal(model.get_parameter(shard.name), shard.local.bfloat16())


class Own(nn.Module):
    """A user's module: tied, with a frozen part and a buffer that nothing draws."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.frozen = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(3.0))


def test_a_module_of_one_s_own():
    torch.manual_seed(0)
    model = Own()
    _, before, after = perturbed(model, 2)
    assert torch.equal(before["frozen.weight"], after["frozen.weight"]) and model.scale == 3.0
    assert model.head.weight is model.embed.weight and not torch.equal(before["embed.weight"], after["embed.weight"])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


def test_parameters_that_nothing_draws_are_refused_before_the_run():
    with pytest.raises(PlanError, match=r"perturb: nothing says how inner.gain would be drawn anew"):
        Perturb(CONFIG, nn.ModuleDict({"inner": Bare(), "outer": nn.Linear(2, 2)}), seed=0, steps=10)


def test_without_it_nothing_is_kept_or_done():
    model = llama()
    replica = ModuleReplica(Masters(model, torch.float32), SGD(), mesh=Mesh.alone())
    assert not Perturb(None, model, seed=0, steps=10).stepped(2, replica, ends_cycle=True)
