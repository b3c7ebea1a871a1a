import pytest
import torch
from torch import nn

from optim.problem import build
from paceline.optim.matrices import is_block_matrix
from paceline.optim.muon import Muon, orthogonal


def blocks(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (20, 6),
        "model.layers.0.wide.weight": (4, 8),
        "model.layers.0.tall.weight": (8, 4),
        "model.layers.1.wide.weight": (4, 8),
        "model.layers.1.experts": (3, 4, 8),
        "model.layers.1.norm.weight": (8,),
    }
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


def test_which_parameters_are_muons():
    held = blocks()
    own = {name for name, p in held.items() if is_block_matrix(name, p.shape)}
    assert own == {name for name in held if "wide" in name or "tall" in name or "experts" in name}
    assert not is_block_matrix("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (4, 4))


def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adamw():
    ours, theirs = blocks(), blocks()
    options = Muon(lr=0.02, weight_decay=0.3)
    optimizer = build(options, ours)
    matrices = [p for n, p in theirs.items() if p.ndim == 2 and is_block_matrix(n, p.shape)]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["model.embed_tokens.weight"]], "weight_decay": 0.3},
            {"params": [theirs["model.layers.1.norm.weight"]], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=options.betas,
        eps=options.eps,
    )
    for step in range(4):
        generator = torch.Generator().manual_seed(step + 1)
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        adamw.step()
    for name in ours:
        if "experts" not in name:
            # Batched and single bf16 products may round differently in the last bit.
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-4, msg=name)


def test_each_expert_of_a_stack_is_a_matrix_of_its_own():
    held = blocks(torch.float64)
    stack = held["model.layers.1.experts"]
    alone = {f"model.layers.{i}.weight": nn.Parameter(stack.detach()[i].clone()) for i in range(3)}
    gradient = torch.randn(stack.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stack.grad = gradient
    build(Muon(lr=0.1), {"model.layers.1.experts": stack}).step()
    for i, parameter in enumerate(alone.values()):
        parameter.grad = gradient[i].clone()
    build(Muon(lr=0.1), alone).step()
    for i, parameter in enumerate(alone.values()):
        torch.testing.assert_close(stack[i], parameter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4, 4), (2, 3, 64)])
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonal(matrices, 5))
    assert values.min() > 0.3 and values.max() < 1.3


def test_one_kind_of_parameter_alone_is_enough():
    held = blocks()
    for names in (["model.layers.1.norm.weight"], ["model.layers.0.wide.weight"]):
        part = {name: held[name] for name in names}
        optimizer = build(Muon(lr=0.1), part)
        before = part[names[0]].detach().clone()
        part[names[0]].grad = torch.ones_like(before)
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(part[names[0]], before) and part[names[0]].grad is None
