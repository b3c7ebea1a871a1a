import pytest
import torch
from torch import nn

from paceline.errors import PlanError
from paceline.parallel.blocks import blocks
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute_full
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


def test_recompute_gives_the_same_gradients_and_keeps_less():
    ids = torch.arange(24).view(2, 12)
    kept = {}
    gradients = {}
    for recompute in (False, True):
        model = tiny_llama()
        if recompute:
            assert recompute_full(model) == 2
        kept[recompute] = 0

        def keep(tensor, recompute=recompute):
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        loss.backward()
        gradients[recompute] = {name: p.grad for name, p in model.named_parameters()}
    assert kept[True] < kept[False] / 2
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name]), name


def test_recompute_draws_the_same_dropout_twice():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))])

        def forward(self, x):
            return self.layers[0](x)

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        if recompute:
            recompute_full(model)
        torch.manual_seed(1)
        model(torch.ones(2, 64)).sum().backward()
        gradients.append(model.layers[0][0].weight.grad)
    assert torch.equal(*gradients)


def test_recompute_without_blocks_is_refused():
    with pytest.raises(PlanError, match=r"Linear has no nn.ModuleList"):
        recompute_full(nn.Linear(2, 2))


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
