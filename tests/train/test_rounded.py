"""Learning in bf16 without masters: any optimizer, under any layout, in how little memory."""

import itertools

import pytest
import torch
from torch import nn

from meshes import replica
from paceline import registry
from paceline.comm.mesh import Mesh
from paceline.comm.replica import local_part
from paceline.models.chance import stream_seed
from paceline.optim.adamw import AdamW
from paceline.optim.sgd import SGD
from paceline.parallel.full import FullTensors
from paceline.parallel.held import Cut, Held, cut_runs, take
from paceline.parallel.precision import Masters
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid
from paceline.train import rounded
from paceline.train.replica import ModuleReplica

BF16 = torch.bfloat16


class Several(nn.Module):
    """Parameters of every number of dimensions, with the names that optimizers look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 10)])
        self.norm = nn.LayerNorm(7)
        self.experts = nn.Parameter(torch.zeros(3, 5, 4))
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """The full gradient of a parameter: what all layouts are given a part of."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(shape, generator=generator).to(BF16)


def full_tensors(held: ModuleReplica) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Where each box of what this rank holds stands in the full parameter, and its values."""
    found = {}
    for shard in held.shards:
        blocks = held.full.part(shard.name).blocks
        found[shard.name] = [(block.start, block.of(shard.local).clone()) for block in blocks]
    return found


def learn(held: ModuleReplica, steps: int = 4) -> None:
    """Steps on the gradients of the whole model; of each this rank is given its part, and padding has zero."""
    shapes = {name: parameter.shape for name, parameter in Several().named_parameters()}
    for step in range(1, steps + 1):
        held.begin(step)
        for shard in held.shards:
            full, local = gradient(shard.name, shapes[shard.name], step), torch.zeros_like(shard.local)
            for block in held.full.part(shard.name).blocks:
                window = tuple(slice(at, at + size) for at, size in zip(block.start, block.shape, strict=True))
                block.of(local).copy_(full[window])
            shard.set_gradient(local)
        assert held.finish(lambda wish: wish).stepped


def alone(options, seed=0, steps=4):
    held = ModuleReplica(Masters(Several(), BF16, pure=True), options, mesh=Mesh.alone(), rounding_seed=seed)
    learn(held, steps)
    return {name: boxes[0][1] for name, boxes in full_tensors(held).items()}


def cut(member, how, options):
    """What a rank of a layout holds after the steps."""
    grid = Grid(shard=member.size) if how == "shard" else Grid(tensor=member.size)
    with replica(member, grid) as mesh:
        model = Several()
        if how == "shard":
            states = ShardedStates(model, mesh, BF16, zero=3, pure=True)
            return full_tensors(trained(states, options, mesh))
        held = {}
        for name, dim in {"layers.0.weight": 0, "layers.0.bias": 0, "norm.weight": 0, "experts": 1}.items():
            module, _, key = name.rpartition(".")
            full = model.get_parameter(name).detach()
            runs = cut_runs([full.shape[dim]], member.size, member.index)
            part = take(full, dim, runs, -(-full.shape[dim] // member.size))
            setattr(model.get_submodule(module), key, nn.Parameter(part))
            held[name] = Held(full_shape=tuple(full.shape), cuts=(Cut(dim, runs),))
        return full_tensors(trained(Masters(model, BF16, pure=True), options, mesh, held))


def trained(states, options, mesh, held=None):
    made = ModuleReplica(states, options, mesh=mesh, held=held, rounding_seed=0)
    learn(made)
    return made


@pytest.mark.parametrize("how", ["shard", "tensor"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_learns_the_very_bits_of_the_whole(pool, how, ranks):
    """Also where rows do not divide, so that ranks have fewer, none, or padding. SGD: its arithmetic does not depend on
    where in a vector register a value stands."""
    options = SGD(lr=0.01, momentum=0.9)
    whole = alone(options)
    found = pool.run(cut, ranks, how, options)
    for name, full in whole.items():
        seen = torch.zeros(full.shape, dtype=torch.bool)
        for start, box in itertools.chain.from_iterable(rank[name] for rank in found):
            window = tuple(slice(at, at + size) for at, size in zip(start, box.shape, strict=True))
            assert torch.equal(box, full[window]), name
            seen[window] = True
        assert seen.all(), name


def learns_in_bf16(name):
    """Those that are not refused: ``plan.optimizer``."""
    options = registry.OPTIMIZERS.load(name)
    return options.sees != "loss" and not options.averages


@pytest.mark.parametrize("name", list(filter(learns_in_bf16, registry.OPTIMIZERS)))
def test_every_optimizer_is_what_it_is_in_fp32_rounded(name, monkeypatch):
    """A step in fp32 from the same weights lies between the result and a neighbour of it in bf16."""
    monkeypatch.setattr(rounded, "CHUNK", 40)  # several chunks
    options = registry.OPTIMIZERS.load(name)(lr=0.01)
    model = Several()
    held = ModuleReplica(Masters(model, BF16, pure=True), options, mesh=Mesh.alone(), rounding_seed=5)
    assert len(held.optimizer._chunks) > 2
    exact = {shard.name: nn.Parameter(shard.local.float()) for shard in held.shards}
    optimizer = options.build(exact, FullTensors.alone(exact))
    for step in range(1, 5):
        for name_, parameter in exact.items():
            parameter.data.copy_(model.get_parameter(name_))  # goes on from the rounded weights
            parameter.grad = gradient(name_, parameter.shape, step).float()
        optimizer.step()
        held.begin(step)
        for shard in held.shards:
            shard.set_gradient(gradient(shard.name, shard.local.shape, step))
        held.finish(lambda wish: wish)
        for shard in held.shards:
            off = (shard.local.float() - exact[shard.name].detach()).abs()
            place = torch.finfo(BF16).eps * exact[shard.name].detach().abs() + 1e-7
            assert (off <= 1.001 * place).all(), (shard.name, step)
    changed = torch.cat([(s.local != Several().get_parameter(s.name).to(BF16)).flatten() for s in held.shards])
    assert changed.float().mean() > 0.7


def test_rounding_follows_from_seed_step_and_name(monkeypatch):
    def once(seed, step, prefix=""):
        held = ModuleReplica(Masters(Several(), BF16, pure=True), SGD(lr=1e-3), mesh=Mesh.alone(), rounding_seed=seed)
        held.begin(step)
        for shard in held.shards:
            shard.set_gradient(gradient(shard.name, shard.local.shape, 1))
        monkeypatch.setattr(rounded, "stream_seed", lambda *key: stream_seed(*key[:-1], prefix + key[-1]))
        held.finish(lambda wish: wish)
        return torch.cat([shard.local.flatten() for shard in held.shards])

    one = once(0, 1)
    assert torch.equal(one, once(0, 1))
    for other in (once(1, 1), once(0, 2), once(0, 1, "other.")):
        assert 0.1 < (one != other).float().mean() < 0.6


def test_a_parameter_without_a_gradient_stays_and_has_no_state():
    held = ModuleReplica(Masters(Several(), BF16, pure=True), AdamW(), mesh=Mesh.alone(), rounding_seed=0)
    held.begin(1)
    held.shards[0].set_gradient(torch.ones_like(held.shards[0].local))
    held.finish(lambda wish: wish)
    idle = held.shards[1]
    assert torch.equal(idle.local, Several().get_parameter(idle.name).to(BF16))
    assert not held.optimizer.state.get(idle.parameter) and held.optimizer.state[held.shards[0].parameter]


def test_rates_reach_every_chunk(monkeypatch):
    monkeypatch.setattr(rounded, "CHUNK", 1)
    held = ModuleReplica(Masters(Several(), BF16, pure=True), SGD(lr=0.5), mesh=Mesh.alone(), rounding_seed=0)
    before = {shard.name: shard.local.clone() for shard in held.shards}
    held.set_rate_factor(0.0)
    learn(held, 1)
    assert all(torch.equal(before[shard.name], shard.local) for shard in held.shards)


def test_memory_of_a_parameter(monkeypatch):
    """2 bytes of weights, 2 of gradients, 8 of Adam's states; in fp32 one chunk and its gradients at a time."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(10)))
    count = 10 * 64 * 64
    monkeypatch.setattr(rounded, "CHUNK", 64 * 64)
    held = ModuleReplica(Masters(model, BF16, pure=True), AdamW(), mesh=Mesh.alone(), rounding_seed=0)
    assert {id(p) for p in model.parameters()} == {id(s.parameter) for s in held.shards}, "no second copy learns"
    copies = [copy for chunk in held.optimizer._chunks for copy in chunk._copies.values()]
    in_fp32: list[int] = []

    def held_in_fp32(*_, **__):
        gradients = [copy.grad.nbytes for copy in copies if copy.grad is not None]
        in_fp32.append(sum(local_part(copy.detach()).untyped_storage().nbytes() for copy in copies) + sum(gradients))

    monkeypatch.setattr(rounded, "round_box", held_in_fp32)
    held_in_fp32()
    model(torch.ones(1, 64, dtype=BF16)).sum().backward()
    bytes_of = [sum(p.nbytes for p in model.parameters()), sum(p.grad.nbytes for p in model.parameters())]
    held.finish(lambda wish: wish)
    held_in_fp32()
    states = [value for state in held.optimizer.state.values() for value in state.values() if value.ndim]
    assert bytes_of == [2 * count, 2 * count] and sum(state.nbytes for state in states) == 8 * count
    assert in_fp32[0] == in_fp32[-1] == 0 and max(in_fp32) == 2 * 4 * 64 * 64


@pytest.mark.parametrize("zero", [None, 1, 3])
def test_gradients_of_several_micro_batches_are_added_in_fp32(pool, zero):
    """256 + 1 is not a bf16 number: added in bf16, what is small would be lost."""
    for total, dtype in pool.run(accumulate, 1 if zero is None else 2, zero):
        assert total == 258.0 and (dtype is torch.float32 or zero == 1)


def accumulate(member, zero):
    with replica(member, Grid(shard=member.size)) as mesh:
        model = nn.Linear(1, 2, bias=False)
        states = (
            Masters(model, BF16, pure=True) if zero is None else ShardedStates(model, mesh, BF16, zero=zero, pure=True)
        )
        made = ModuleReplica(states, SGD(), mesh=mesh, rounding_seed=0)
        for i, value in enumerate((256.0, 1.0, 1.0)):
            made.expect(i == 2)
            model(torch.full((1, 1), value / member.size, dtype=BF16)).sum().backward()
        (shard,) = made.shards
        return shard.gradient[0].item(), shard.gradient.dtype
