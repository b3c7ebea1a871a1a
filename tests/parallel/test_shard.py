import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from meshes import replica
from paceline.optim.sgd import SGD
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid
from paceline.train.clip import ClipNorm
from paceline.train.replica import ModuleReplica
from parity import tiny_llama


def learn(member, offload):
    """Parameters after a step, its norm, and how many parameters FSDP2 keeps in main memory."""
    model = tiny_llama()
    with replica(member, Grid(shard=member.size)) as mesh:
        states = ShardedStates(model, mesh, torch.float64, zero=3, offload=offload)
        held = ModuleReplica(states, SGD(lr=0.1), [ClipNorm(1.0)], mesh=mesh, device=torch.device("cpu"))
        groups = [
            g for m in model.modules() if isinstance(m, FSDPModule) for g in fully_shard.state(m)._fsdp_param_groups
        ]
        offloaded = sum(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)
        states.expect(True)
        model(input_ids=torch.arange(12)[None] + member.index, use_cache=False).logits.square().sum().backward()
        held.end_backward()
        norm = held.finish(lambda wish: wish).gradient_norm
        return {shard.name: shard.local.clone() for shard in held.shards}, norm, offloaded


def test_offloaded_states_learn_the_same(pool):
    for plain, offloaded in zip(pool.run(learn, 2, False), pool.run(learn, 2, True), strict=True):
        assert (plain[2], offloaded[2]) == (0, len(plain[0]))
        assert plain[1] == offloaded[1] > 1.0
        assert all(torch.equal(plain[0][name], offloaded[0][name]) for name in plain[0])


def from_16_bits(member):
    """Dtypes before and after a model in bf16 is sharded, whether its values are the same, and whether it runs."""
    model, whole = tiny_llama().bfloat16(), tiny_llama().bfloat16()
    with replica(member, Grid(shard=member.size)) as mesh:
        states = ShardedStates(model, mesh, torch.float32, zero=3)
        equal = all(
            torch.equal(parameter.full_tensor(), whole.get_parameter(name).float())
            for name, parameter in states.parameters.items()
        )
        model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum().backward()
        dtypes = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
        return equal, dtypes


def test_masters_of_a_model_in_16_bits_are_fp32_and_have_its_values(pool):
    assert pool.run(from_16_bits, 3) == [(True, {torch.float32})] * 3
