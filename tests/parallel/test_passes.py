import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshes import replica
from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute
from paceline.parallel.tensor import cut_tensor
from paceline.plan.layout import Grid
from parity import assert_equal_training, tiny_llama, train
from tolerances import FP64_EQUAL


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
        self.decoder = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])


def test_blocks_are_the_items_of_the_outermost_lists():
    assert list(blocks(Nested())) == ["encoder.0", "encoder.1", "decoder.0"]
    assert list(blocks(tiny_llama())) == ["model.layers.0", "model.layers.1"]
    assert blocks(nn.Linear(2, 2)) == {}


class Watch(TorchDispatchMode):
    """Counts products of matrices, and knows which of the tensors that were made are still there."""

    def __init__(self):
        super().__init__()
        self.products = 0
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = StorageWeakRef(leaf.untyped_storage())
                self._made[storage.cdata] = storage, leaf.untyped_storage().nbytes()
        return result

    def alive_bytes(self):
        return sum(size for storage, size in self._made.values() if not storage.expired())


def test_recompute_gives_the_same_gradients_and_keeps_less():
    ids = torch.arange(24).view(2, 12)
    kept_bytes, products, gradients = {}, {}, {}
    for how in ("none", "selective", "full"):
        model = tiny_llama()
        if how != "none":
            assert recompute(model, how) == 2
        with Watch() as forward:
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        kept_bytes[how] = forward.alive_bytes()
        with Watch() as backward:
            loss.backward()
        products[how] = backward.products
        gradients[how] = {name: p.grad for name, p in model.named_parameters()}
    assert kept_bytes["full"] < 0.6 * kept_bytes["selective"] < 0.6 * 0.8 * kept_bytes["none"], kept_bytes
    assert products["selective"] == products["none"] < products["full"]
    for name, gradient in gradients["none"].items():
        assert torch.equal(gradient, gradients["selective"][name]), name
        assert torch.equal(gradient, gradients["full"][name]), name


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recompute_draws_the_same_dropout_twice(how):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))])

        def forward(self, x):
            return self.layers[0](x)

    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        if recomputed:
            recompute(model, how)
        torch.manual_seed(1)
        model(torch.ones(2, 64)).sum().backward()
        gradients.append(model.layers[0][0].weight.grad)
    assert torch.equal(*gradients)


class Attending(nn.Module):
    """A block whose attention drops out, and then more does."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        heads = self.project(x)[None, None]
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        return nn.functional.dropout(attended, 0.5) * self.project(x)


class Overwriting(Attending):
    def forward(self, x):
        return self.project(x).tanh_()


def grad_of(block, how):
    model = nn.Module()
    torch.manual_seed(0)
    model.layers = nn.ModuleList([block()])
    if how != "none":
        recompute(model, how)
    torch.manual_seed(1)
    model.layers[0](torch.randn(5, 8)).sum().backward()
    return model.layers[0].project.weight.grad


def test_attention_that_draws_numbers_is_computed_again_so_that_those_after_it_are_the_same():
    assert torch.equal(grad_of(Attending, "selective"), grad_of(Attending, "none"))


def test_a_kept_result_that_the_model_writes_over_is_refused():
    with pytest.raises(PlanError, match=r"writes over the result of aten::addmm.*Use recompute=full"):
        grad_of(Overwriting, "selective")


def test_a_backward_pass_may_come_twice():
    model = tiny_llama()
    recompute(model, "selective")
    loss = model(input_ids=torch.arange(12)[None], use_cache=False).logits.square().sum()
    weights = list(model.parameters())
    first, second = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def collectives(member, how):
    """What a step under tensor parallelism starts, by kind; and a gradient."""
    model = tiny_llama()
    with replica(member, Grid(tensor=member.size)) as mesh:
        cut_tensor(model, mesh, sequence=False)
        if how != "none":
            recompute(model, how)
        model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum().backward()
        return mesh.tally.calls, model.model.layers[0].mlp.up_proj.weight.grad


def test_what_ranks_sent_is_kept_and_not_sent_again(pool):
    (none, expected), (selective, gradient), (full, _) = (
        pool.run(collectives, 2, how)[0] for how in ("none", "selective", "full")
    )
    assert torch.equal(gradient, expected)
    assert selective == none and full.total() > none.total()


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recompute_without_blocks_is_refused(how):
    with pytest.raises(PlanError, match=rf"recompute={how}.*Linear has no nn.ModuleList"):
        recompute(nn.Linear(2, 2), how)


def test_masters_of_the_same_dtype_are_the_parameters():
    model = nn.Linear(3, 2)
    assert Masters(model, torch.float32).parameters["weight"] is model.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_of_a_bf16_module_are_fp32(dtype):
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    masters = Masters(model, dtype)
    assert model.weight.dtype == dtype and masters.parameters["weight"].dtype == torch.float32


def test_masters_gather_bf16_gradients_in_fp32():
    """256 + 1 is not a bf16 number: accumulated in bf16, the small gradients would be lost."""
    model = nn.Linear(1, 1, bias=False)
    masters = Masters(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and masters.parameters["weight"].dtype == torch.float32
    told = []
    masters.on_gradient(told.append)
    for value in (256.0, 1.0, 1.0):
        model(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert masters.parameters["weight"].grad.item() == 258.0
    assert model.weight.grad is None and told == ["weight"] * 3


def test_masters_keep_what_bf16_cannot_and_refresh_the_model():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    masters = Masters(model, torch.bfloat16)
    with torch.no_grad():
        masters.parameters["weight"] += 1e-3  # 1.001 rounds to 1 in bf16
        masters.refresh()
        assert model.weight.item() == 1.0
        masters.parameters["weight"] += 7e-3
        masters.refresh()
    assert model.weight.item() == pytest.approx(1.0078125)
    assert masters.parameters["weight"].item() == pytest.approx(1.008)


def test_masters_cast_frozen_parameters_but_no_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    masters = Masters(model, torch.bfloat16)
    assert "0.weight" not in masters.parameters and model[0].weight.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32


def test_tied_parameters_have_one_master():
    model = tiny_llama().float()
    masters = Masters(model, torch.bfloat16)
    assert "lm_head.weight" not in masters.parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_equals_the_whole_batch(micro):
    assert_equal_training(train(None, micro=7), train(None, micro=micro), FP64_EQUAL)
