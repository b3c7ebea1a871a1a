import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from meshes import replica
from paceline.comm.link import LocalLink
from paceline.optim.sgd import SGD
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid
from paceline.registry import SYNCS
from paceline.sync.base import SyncContext
from paceline.train.clip import ClipNorm
from paceline.train.replica import ModuleReplica
from paceline.train.state import Variant, tensors
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


def frozen_after_a_forward_pass(member):
    """The state of the model, which holds gathered weights now, for a checkpoint: this rank's part of each."""
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    with replica(member, Grid(shard=member.size)) as mesh:
        states = ShardedStates(model, mesh, torch.float64, zero=3)
        held = ModuleReplica(states, SGD(lr=0.1), [ClipNorm(1.0)], mesh=mesh, device=torch.device("cpu"))
        with torch.no_grad():
            model(input_ids=torch.arange(12)[None], use_cache=False)
        sync = SYNCS.load("all_reduce")().build(SyncContext(link=LocalLink(), steps=1))
        saved = tensors(model, held, sync, Variant(0, 1), average={})
        return {slot: [block.of(state.tensor).clone() for block in state.blocks] for slot, state in saved.items()}


def test_frozen_weights_are_saved_as_they_are_shared_also_while_they_are_gathered(pool):
    whole = tiny_llama()
    parts = pool.run(frozen_after_a_forward_pass, 2)
    for name, parameter in whole.named_parameters():
        values = torch.cat([block.flatten() for part in parts for block in part[f"model/{name}"]])
        assert torch.equal(values, parameter.detach().flatten()), name


def in_16_bits(member, zero, reduction):
    """A gradient of three micro-batches, and the bytes that its sum over the ranks took."""
    with replica(member, Grid(shard=member.size)) as mesh:
        model = torch.nn.Linear(1, 2, bias=False)
        states = ShardedStates(model, mesh, torch.float32, zero=zero, reduction=reduction)
        for i, value in enumerate((256.0, 1.0, 1.0)):
            states.expect(i == 2)
            model(torch.full((1, 1), value)).sum().backward()
        (gradient,) = (parameter.grad.to_local() for parameter in states.parameters.values())
        sent = mesh.tally.bytes["reduce_scatter", "states", "the rest"]
        return gradient.dtype, gradient.flatten().tolist(), sent


@pytest.mark.parametrize(("zero", "passes"), [(1, 1), (2, 3), (3, 3)])
def test_sums_over_ranks_in_bf16_leave_those_over_micro_batches_in_fp32(pool, zero, passes):
    """256 + 1 is not a bf16 number: added in bf16, the later micro-batches would be lost."""
    for reduction, itemsize in ((None, 4), (torch.bfloat16, 2)):
        for dtype, gradient, sent in pool.run(in_16_bits, 2, zero, reduction):
            assert (dtype, gradient, sent) == (torch.float32, [2 * 258.0], passes * 2 * itemsize)


def rounded_on_the_way(member):
    """1 + 2^-9 from each rank, summed in bf16."""
    with replica(member, Grid(shard=member.size)) as mesh:
        model = torch.nn.Linear(1, 2, bias=False)
        states = ShardedStates(model, mesh, torch.float32, zero=3, reduction=torch.bfloat16)
        model(torch.full((1, 1), 1.0 + 2.0**-9)).sum().backward()
        return [parameter.grad.to_local().item() for parameter in states.parameters.values()]


def test_what_is_sent_in_bf16_is_rounded(pool):
    assert pool.run(rounded_on_the_way, 2) == [[2.0], [2.0]]
