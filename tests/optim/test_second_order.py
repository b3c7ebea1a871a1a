"""The two that look at the loss again and again, on a real model's loss."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.test_layouts import config
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.config import strategy_name
from paceline.errors import PlanError
from paceline.optim.lbfgs import LBFGS
from paceline.optim.newton_cg import NewtonCG
from paceline.parallel.precision import Masters
from paceline.plan.run import plan_run
from paceline.schedule.accumulate import Accumulate
from paceline.sync.all_reduce import AllReduce
from paceline.sync.base import SyncContext
from paceline.train.again import Again
from paceline.train.replica import ModuleReplica
from paceline.verify.double import in_double
from parity import CPU, objective, on_pool, rows, tiny_llama, train
from tolerances import FP64_EQUAL

SEARCHING = pytest.mark.parametrize("options", [LBFGS(), NewtonCG()], ids=["lbfgs", "newton_cg"])


def test_products_are_those_of_the_hessian():
    """Against torch's own, of the mean loss of the whole batch as one function; ours come from micro-batches."""
    model, goal = tiny_llama(), objective()
    replica = ModuleReplica(Masters(model, torch.float64), NewtonCG(), mesh=Mesh.alone())
    sync = AllReduce().build(SyncContext(link=LocalLink(), steps=1))
    sync.start(replica)
    batches = [goal.batch(rows(0, 5)[i : i + 2], seed=0, step=1) for i in (0, 2, 4)]
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    again = Again(replica, sync, schedule, batches, step=1)
    generator = torch.Generator().manual_seed(1)
    names = list(replica.local)
    vectors = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in replica.local.values()]
    with in_double():  # the family's norms compute in fp32 otherwise, and add up micro-batches there
        got = again.product(vectors)
    whole, targets = goal.batch(rows(0, 5), seed=0, step=1), sum(batch.count for batch in batches)

    def loss(*values):
        values = dict(zip(names, values, strict=True))
        logits = torch.func.functional_call(model, values, kwargs=dict(whole.inputs)).logits
        return F.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), reduction="sum") / targets

    at = tuple(p.detach() for p in replica.local.values())
    with in_double(), sdpa_kernel(SDPBackend.MATH):  # other kernels have one derivative
        _, expected = torch.autograd.functional.hvp(loss, at, tuple(vectors))
    for name, one, other in zip(names, got, expected, strict=True):
        assert (one - other).norm() <= FP64_EQUAL * other.norm(), name


@SEARCHING
def test_the_loss_falls_faster_than_by_gradient_descent(options):
    losses = [train(None, steps=8, micro=7, optimizer=o, same_batch=True)["losses"] for o in (options, None)]
    assert losses[0][-1] < 0.8 * losses[1][-1]


@SEARCHING
def test_replicas_that_share_the_batch_do_what_one_process_does(options, pool):
    one = train(None, steps=4, optimizer=options)
    for each in pool.run(on_pool, 2, {"steps": 4, "optimizer": options}):
        for name, weight in each["weights"].items():
            assert (weight - one["weights"][name]).norm() <= FP64_EQUAL * weight.norm(), name


@SEARCHING
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": 1, "clip_norm": 1.0}}, "train.clip_norm=1.0"),
        ({"precision": "bf16"}, "precision=bf16"),
    ],
)
def test_what_a_search_could_not_trust_is_refused(options, changes, expected):
    name = strategy_name(options)
    with pytest.raises(PlanError, match=rf"{expected}: optimizer={name} compares"):
        plan_run(config(name, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": 1, "clip_norm": None, "compile": True}}, "train.compile=true"),
        ({"layout": {"recompute": "full"}}, "layout.recompute=full"),
    ],
)
def test_what_cannot_be_differentiated_twice_is_refused(changes, expected):
    with pytest.raises(PlanError, match=rf"{expected}: optimizer=newton_cg differentiates twice"):
        plan_run(config("newton_cg", **changes))
    plan_run(config("lbfgs", **changes))
