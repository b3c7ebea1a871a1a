"""What the ranks of a replica add up at the end of a step, and in what."""

import pytest
import torch
from torch import nn

from meshes import replica
from paceline.comm.mesh import Mesh
from paceline.optim.adamw import AdamW
from paceline.optim.sgd import SGD
from paceline.parallel.held import Held
from paceline.parallel.precision import Masters
from paceline.plan.layout import Grid
from paceline.plan.precision import PRECISIONS
from paceline.train.replica import ModuleReplica


def parts(member, dtype, pure, reduction):
    """A gradient of which each tensor rank has a part: the sum, and the bytes it took."""
    with replica(member, Grid(tensor=member.size)) as mesh:
        model = nn.Linear(8, 1, bias=False, dtype=torch.promote_types(dtype, torch.float32))
        held = {"weight": Held(full_shape=(1, 8), summed_over=mesh.tensor, is_owner=member.index == 0)}
        made = ModuleReplica(
            Masters(model, dtype, pure=pure), SGD(), mesh=mesh, held=held, reduction=reduction, rounding_seed=None
        )
        made.expect(True)
        (model.weight * (256.0, 1.0, 1.0)[member.index]).sum().backward()
        made.end_backward()
        (shard,) = made.shards
        return (
            shard.gradient[0, 0].item(),
            shard.gradient.dtype,
            mesh.tally.bytes["all_reduce", "tensor", "parts of gradients"],
        )


@pytest.mark.parametrize(
    ("dtype", "pure", "reduction", "itemsize"),
    [
        (torch.float32, False, None, 4),
        (torch.bfloat16, False, None, 4),
        (torch.float16, False, None, 4),
        (torch.bfloat16, True, None, 4),
        (torch.float64, False, None, 8),
        (torch.float32, False, torch.bfloat16, 2),
    ],
)
def test_parts_of_a_gradient_are_summed_in_fp32_unless_asked_otherwise(pool, dtype, pure, reduction, itemsize):
    """256 + 1 is not a bf16 number. What is asked for is what is sent: 8 values and a mark."""
    for total, held_in, sent in pool.run(parts, 3, dtype, pure, reduction):
        assert total == 258.0 or reduction is not None
        assert held_in == (dtype if pure else torch.promote_types(dtype, torch.float32))
        assert sent == 9 * itemsize


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 16), ("bf16", 18), ("bf16_pure", 12), ("fp16", 18)])
def test_bytes_of_a_parameter(precision, expected):
    """Weights, what is computed with, gradient, and the two states of AdamW, counted tensor by tensor after a step."""
    model, chosen = nn.Linear(32, 32, bias=False), PRECISIONS[precision]
    compute = getattr(torch, chosen.compute)
    states = Masters(model, compute, pure=chosen.is_pure)
    made = ModuleReplica(states, AdamW(), mesh=Mesh.alone(), rounding_seed=0 if chosen.is_pure else None)
    model(torch.ones(1, 32, dtype=compute)).sum().backward()
    (shard,) = made.shards
    held = {id(tensor): tensor for tensor in (model.weight, shard.parameter, shard.parameter.grad)}
    assert model.weight.grad is None or model.weight is shard.parameter
    assert made.finish(lambda wish: wish).stepped
    kept = [tensor for tensor in made.optimizer.state[shard.parameter].values() if tensor.ndim]
    assert sum(tensor.nbytes for tensor in (*held.values(), *kept)) == expected * 32 * 32
    assert chosen.stored_bytes == shard.local.itemsize and {tensor.dtype for tensor in kept} == {torch.float32}
