"""All-reduce with reducers that leave something out."""

import pytest
import torch

from paceline.comm import link
from paceline.comm.mesh import Mesh
from paceline.config import Config, LossScaleConfig, choose
from paceline.errors import ConfigError, PlanError
from paceline.optim.sgd import SGD
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.registry import REDUCERS, SYNCS
from paceline.sync.base import SyncContext
from paceline.train.loss_scale import LossScale
from paceline.train.replica import ModuleReplica
from parity import assert_equal_training, identical, on_pool, tiny_llama, train
from tolerances import FP64_EQUAL

LOSSY = [name for name in REDUCERS if not REDUCERS.load(name).is_exact]
EVERY = pytest.mark.parametrize("name", LOSSY)


def reduced(name, **options):
    return {"name": "all_reduce", "reducer": {"name": name, **options}}


@EVERY
def test_one_replica_is_plain_training_bit_for_bit(name):
    assert_equal_training(train(None, momentum=0.5), train(None, sync=reduced(name), momentum=0.5), 0.0)


@EVERY
def test_replicas_agree_and_send_what_is_announced(name, pool):
    shapes = {name: p.shape for name, p in tiny_llama().named_parameters()}
    for replicas in (2, 3):
        told = pool.run(on_pool, replicas, {"sync": reduced(name), "dtype": torch.float32})
        assert identical(told)
        announced = choose(SYNCS, reduced(name)).wire_bytes(shapes, replicas, 3)
        assert [own["sent_bytes"] for own in told] == [announced] * replicas


def test_all_of_the_values_are_the_gradient_of_the_whole_batch(pool):
    whole = train(None, micro=7, momentum=0.5, clip_norm=1.0)
    told = pool.run(on_pool, 3, {"sync": reduced("topk", share=1.0), "momentum": 0.5, "clip_norm": 1.0})
    for own in told:
        assert_equal_training(whole, own, FP64_EQUAL)


def apart(one, other):
    pairs = [(one["weights"][name], other["weights"][name]) for name in one["weights"]]
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


@EVERY
def test_error_feedback_brings_the_run_nearer_to_that_of_the_mean(name, pool):
    options = {"steps": 8, "same_batch": True, "lr": 0.05}
    mean = train(None, micro=7, **options)
    share = {"share": 0.1} if name in {"topk", "randomk"} else {}
    with_it, without = (
        pool.run(on_pool, 2, {"sync": reduced(name, error_feedback=on, **share), **options})[0] for on in (True, False)
    )
    assert 0 < apart(mean, with_it) < apart(mean, without)


def skipping(member, name, scale, steps):
    """Steps of given gradients, of which some overflow in replica 1: weights, what is left over, and who stepped."""
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({"w": torch.ones(30, 20), "none": torch.ones(3)})
    loss_scale = LossScale(LossScaleConfig(initial=scale)) if scale else None
    replica = ModuleReplica(
        Masters(model, torch.float32), SGD(lr=0.1, momentum=0.5), mesh=Mesh.alone(), loss_scale=loss_scale
    )
    sync = choose(SYNCS, reduced(name)).build(SyncContext(link=between, steps=9))
    sync.start(replica)
    told = []
    for step in steps:
        sync.begin(step, replica, 1)
        generator = torch.Generator().manual_seed(10 * step + member.index)
        gradient = torch.randn(30, 20, generator=generator) * replica.loss_scale.value
        if step in OVERFLOWS and member.index == 1:
            gradient[3, 4] = torch.inf
        model["w"].grad = gradient
        sync.reduce(replica)
        assert model["none"].grad is None
        told.append(sync.update(replica).stepped)
    left = {key: state.tensor.clone() for key, state in sync.state().items()}
    return model["w"].detach().clone(), left, told


OVERFLOWS = {2, 3}


@EVERY
def test_steps_that_overflow_leave_all_as_it_was(name, pool):
    """The same bits as without them and without a loss scale, which halves in each."""
    plain = pool.run(skipping, 2, name, None, (1, 4, 5))
    scaled = pool.run(skipping, 2, name, 2.0**10, (1, 2, 3, 4, 5))
    for (weights, left, _), (same, also_left, stepped) in zip(plain, scaled, strict=True):
        assert stepped == [True, False, False, True, True]
        assert torch.equal(weights, same) and not torch.equal(weights, torch.ones(30, 20))
        assert left.keys() == also_left.keys()
        assert all(torch.equal(left[key], also_left[key]) for key in left)
        assert not left.get("none/residual", torch.zeros(1)).any()


def parsed(sync, **other):
    tree = {
        "model": {"preset": "llama-1m"},
        "data": {"source": "x"},
        "train": {"steps": 4, "output": "y"},
        "sync": sync,
    }
    return Config.parse({**tree, "replicas": 2, **other})


@pytest.mark.parametrize(
    "sync",
    [
        {"name": "all_reduce", "reducer": "int8", "bucket_mib": 2.0},
        {"name": "all_reduce", "reducer": {"name": "mean", "bucket_mib": 3.0}},
    ],
)
def test_buckets_that_would_not_be_are_refused(sync):
    with pytest.raises(ConfigError, match=r"bucket_mib=.*leave"):
        parsed(sync)


@pytest.mark.parametrize("optimizer", ["sophia", "lbfgs", "newton_cg"])
def test_optimizers_that_ask_for_other_gradients_are_refused(optimizer):
    with pytest.raises(PlanError, match="asks for other gradients"):
        plan_run(parsed({"name": "all_reduce", "reducer": "int8"}, optimizer=optimizer))
