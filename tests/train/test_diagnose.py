from contextlib import contextmanager

import pytest
import torch
from torch import nn

from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.errors import NonFiniteElsewhere, NonFiniteError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.schedule.accumulate import Accumulate
from paceline.sync.all_reduce import AllReduce
from paceline.sync.base import SyncContext
from paceline.train.clip import ClipNorm
from paceline.train.diagnose import locate
from paceline.train.replica import ModuleReplica
from paceline.train.step import train_step
from parity import objective, rows, tiny_llama

ERROR = NonFiniteError("loss is nan at step 7")


def batches():
    return [objective().batch(rows(1, 4), seed=0, step=1)]


def found(model: nn.Module, dtype: torch.dtype = torch.float64) -> NonFiniteError:
    replica = ModuleReplica(Masters(model, dtype), SGD(), mesh=Mesh.alone())
    return locate(ERROR, model, replica, objective(), batches(), "replica 0, rank 0")


def test_the_first_output_is_named():
    model = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(
        lambda *_: torch.full((4, 12, 16), float("inf"), dtype=torch.float64)
    )
    text = str(found(model))
    assert text.startswith("loss is nan at step 7; it began in the output of model.layers.1.mlp (replica 0, rank 0")


def test_a_bad_weight_is_named_before_what_follows_from_it():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    assert "began in the weight model.layers.0.self_attn.q_proj.weight" in str(found(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_that_explodes_under_a_finite_loss_is_named(dtype):
    model = tiny_llama()
    model.model.norm.weight.register_hook(lambda g: g * float("inf"))
    assert "began in the gradient of model.norm.weight" in str(found(model, dtype))


def test_a_rank_without_fault_says_so():
    assert isinstance(found(tiny_llama()), NonFiniteElsewhere)


def test_what_is_random_is_drawn_again_as_it_was():
    """The fault shows only while what the failed step drew is in force."""
    model, drawn = tiny_llama(), []

    @contextmanager
    def drawing(batch):
        drawn.append(batch.sequences)
        yield
        drawn.append(None)

    def fault(_module, _inputs, output):
        return output * (float("inf") if drawn[-1:] == [(4, 5, 6, 7)] else 1.0)

    model.model.layers[1].mlp.register_forward_hook(fault)
    replica = ModuleReplica(Masters(model, torch.float64), SGD(), mesh=Mesh.alone())
    error = locate(ERROR, model, replica, objective(), batches(), "replica 0, rank 0", drawing)
    assert "began in the output of model.layers.1.mlp" in str(error) and drawn[1] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_left_clean_and_no_sync_is_told(dtype):
    model, told = tiny_llama(), []
    replica = ModuleReplica(Masters(model, dtype), SGD(), mesh=Mesh.alone())
    replica.on_gradient_ready(told.append)
    replica.expect(True)  # as the failed step left it
    locate(ERROR, model, replica, objective(), batches(), "replica 0, rank 0")
    assert all(shard.parameter.grad is None for shard in replica.shards) and told == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_raises_before_the_weights_change(value):
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _m, _i, out: out * value)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replica = ModuleReplica(Masters(model, torch.float64), SGD(), [ClipNorm(1.0)], mesh=Mesh.alone())
    sync = AllReduce().build(SyncContext(link=LocalLink(), steps=3))
    sync.start(replica)
    schedule = Accumulate(model, objective(), seed=0, device=torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="at step 3"):
        train_step(replica, sync, schedule, batches(), step=3, stop=False)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
