"""The loss scale: by its rule, against steps in fp64 that are not scaled, and with an overflow on one rank alone."""

import math

import pytest
import torch

import pipelines
from meshes import replica
from paceline.comm.device import claim
from paceline.comm.link import LocalLink
from paceline.comm.mesh import Mesh
from paceline.comm.ranks import Coordinates
from paceline.comm.world import enter
from paceline.config import LayoutConfig, LossScaleConfig
from paceline.data.tokenizer import SpecialTokens
from paceline.errors import NonFiniteError
from paceline.objectives.base import ObjectiveContext
from paceline.objectives.next_token import NextToken
from paceline.optim.sgd import SGD
from paceline.parallel.balance import balanced
from paceline.plan.layout import Grid
from paceline.plan.precision import PRECISIONS
from paceline.schedule.accumulate import Accumulate
from paceline.sync.all_reduce import AllReduce
from paceline.sync.base import SyncContext
from paceline.train.build import Goal, build
from paceline.train.clip import ClipNorm
from paceline.train.loss_scale import MOST, LossScale
from paceline.train.step import train_step
from parity import CPU, SEQUENCE_TOKENS, VOCABULARY, objective, rows, share, tiny_llama
from tolerances import FP16_LOSS, FP64_EQUAL

RATE, MOMENTUM, CLIP = 0.3, 0.5, 0.7
SEQUENCES, STEPS, BAD_STEP = 8, 5, 3


def test_it_falls_at_once_and_grows_after_many_steps():
    scale = LossScale(LossScaleConfig(initial=8.0, growth_steps=3, least=2.0))
    seen = []
    for stepped in (True, True, True, True, False, True, True, False, True, True, True):
        skipped = scale.after(stepped)
        seen.append((scale.value, skipped))
    values = [8, 8, 16, 16, 8, 8, 8, 4, 4, 4, 8]
    assert seen == [(value, step in (4, 7)) for step, value in enumerate(values)]
    assert scale.skipped_steps == 2


def test_at_the_least_an_overflow_is_an_error_and_at_the_most_it_stays():
    scale = LossScale(LossScaleConfig(initial=4.0, growth_steps=1, least=2.0))
    assert scale.after(False) and scale.value == 2.0
    assert not scale.after(False) and scale.value == 2.0
    for _ in range(40):
        scale.after(True)
    assert scale.value == MOST and scale.skipped_steps == 1
    high = LossScale(LossScaleConfig(initial=2 * MOST, growth_steps=1))
    high.after(True)
    assert high.value == 2 * MOST, "one that starts higher does not grow either"


def test_what_is_not_scaled_is_never_skipped():
    scale = LossScale()
    assert not scale.after(False) and scale.value == 1.0 and not scale.is_dynamic


def test_its_state_goes_on():
    scale = LossScale(LossScaleConfig(growth_steps=4))
    for stepped in (True, False, True, True):
        scale.after(stepped)
    other = LossScale(LossScaleConfig(growth_steps=4))
    other.load(scale.state())
    for one in (scale, other):
        one.after(True)
        one.after(True)
    assert scale.state().tolist() == other.state().tolist() == [65536.0, 0, 1], "value, good steps, skipped steps"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initial": 1000.0}, "initial=1000 is not a power of two; use 1024"),
        ({"least": 0.3}, "least=0.3 is not a power of two; use 0.25"),
        ({"initial": 1.0, "least": 2.0}, "least=2 is above initial=1"),
    ],
)
def test_scales_that_would_round(options, expected):
    with pytest.raises(ValueError, match=expected):
        LossScaleConfig(**options)


def by_hand() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """SGD with momentum and clipping, unscaled, in fp64; the bad step is not taken. Losses, norms, weights."""
    model, losses, norms = tiny_llama(), [], []
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(1, STEPS + 1):
        batch = objective().batch(rows(step, SEQUENCES), seed=0, step=step)
        logits = model(**batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        losses.append(loss.item())
        norms.append(norm)
        if step == BAD_STEP:
            continue
        for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
            velocity[name] = MOMENTUM * velocity[name] + grad * min(1.0, CLIP / norm)
            parameter.data -= RATE * velocity[name]
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


TRIED = LossScaleConfig(initial=1024.0, growth_steps=2)
TOO_HIGH = LossScaleConfig(initial=2.0**21)


def learn(member, layout, replicas, bad_rank=None, how="backward", precision="fp64", options=TRIED):
    """Steps under a layout, scaled, also in fp64; in one of them a gradient is made infinite on ``bad_rank``."""
    index, size, store = (member.index, member.size, member.store) if member else (0, 1, None)
    ranks = size // replicas
    place = Coordinates.of(index, replicas=replicas, ranks=ranks, local_rank=index, local_ranks=size)
    goal, seen, scales = objective(), [], []
    grid = Grid.of(LayoutConfig(**layout))
    with enter(place, claim(place), store, grid, timeout_s=30.0, loopback=True) as world:
        built = tiny(world.mesh, layout, precision)
        held = built.replica
        held.loss_scale = LossScale(options)
        fault = Fault(built.model, held, how)
        sync = AllReduce(bucket_mib=0.002).build(SyncContext(link=world.link, steps=1))
        sync.start(held)
        for step in range(1, STEPS + 1):
            fault.is_on = step == BAD_STEP and index == bad_rank
            parts = share(step, SEQUENCES, world.data_rank, world.data_ranks, 2)
            batches = [built.split(goal.batch(part, seed=0, step=step)) for part in parts]
            seen.append(train_step(held, sync, built.schedule, batches, step=step, stop=False))
            scales.append(held.loss_scale.value)
        boxes = [
            (shard.name, block.start, block.of(shard.local).clone())
            for shard in held.shards
            for block in held.full.part(shard.name).blocks
        ]
    return {
        "losses": [result.loss for result in seen],
        "norms": [result.gradient_norm for result in seen],
        "skipped": [result.skipped for result in seen],
        "scales": scales,
        "counted": held.loss_scale.skipped_steps,
        "boxes": boxes,
    }


def tiny(mesh, layout, precision, goal=None):
    """The tiny llama under a layout."""
    context = ObjectiveContext(special=SpecialTokens(end=0, vocabulary=VOCABULARY), sequence_tokens=SEQUENCE_TOKENS)
    sample = objective().batch(rows(0, 4)[2:], seed=0, step=0)
    return build(
        tiny_llama() if precision == "fp64" else tiny_llama().float(),
        Goal(objective=goal or objective(), options=NextToken(), context=context, sample=sample),
        layout=LayoutConfig(**layout),
        mesh=mesh,
        optimizer=SGD(lr=RATE, momentum=MOMENTUM),
        adjust=lambda _: [ClipNorm(CLIP)],
        precision=PRECISIONS[precision],
        device=CPU,
        seed=0,
    )


class Fault:
    """An infinite gradient, while it is on: in a backward pass, or of a copy that another rank counts in the norm."""

    def __init__(self, model, held, how):
        self.is_on = False
        if how == "backward":
            name = [name for name, _ in model.named_modules() if name.endswith(".mlp")][-1]
            model.get_submodule(name).register_forward_hook(self._forward)
        for shard in held.shards if how == "copy" else ():
            if shard.name.endswith("layernorm.weight") and not held.owns(shard.name):
                shard.parameter.register_hook(lambda grad: grad * float("inf") if self.is_on else grad)

    def _forward(self, _module, _inputs, output):
        if self.is_on:
            output.register_hook(lambda grad: grad * float("inf"))
        return output


LAYOUTS = {
    "replicas": ({}, 2, 1, "backward"),
    "shard": ({"shard": 2}, 1, 1, "backward"),
    "shard and states": ({"shard": 2, "zero": 1}, 1, 0, "backward"),
    "tensor": ({"tensor": 2}, 1, 1, "backward"),
    "a copy on a tensor rank": ({"tensor": 2}, 1, 1, "copy"),
    "a copy on a tensor rank of one replica": ({"tensor": 2}, 2, 3, "copy"),
    "first stage": ({"pipeline": 2, "schedule": "gpipe"}, 1, 0, "backward"),
    "last stage": ({"pipeline": 2, "schedule": "gpipe"}, 1, 1, "backward"),
    "replicas of shards": ({"shard": 2}, 2, 2, "backward"),
}


@pytest.fixture(scope="module")
def truth():
    return by_hand()


@pytest.mark.parametrize("case", ["one process", *LAYOUTS])
def test_an_overflow_on_one_rank_is_skipped_by_all(pool, truth, case):
    """And everything else is as if nothing had been scaled: losses, norms, momentum, weights."""
    layout, replicas, bad_rank, how = LAYOUTS.get(case, ({}, 1, 0, "backward"))
    ranks = replicas * Grid.of(LayoutConfig(**layout)).ranks
    found = pool.run(learn, ranks, layout, replicas, bad_rank, how) if ranks > 1 else [learn(None, {}, 1, 0)]
    losses, norms, weights = truth
    good = [step for step in range(STEPS) if step + 1 != BAD_STEP]
    for rank in found:
        assert rank["skipped"] == [step + 1 == BAD_STEP for step in range(STEPS)]
        assert rank["scales"] == [1024, 2048, 1024, 1024, 2048] and rank["counted"] == 1
        assert rank["losses"] == pytest.approx(losses, rel=FP64_EQUAL)
        assert [rank["norms"][i] for i in good] == pytest.approx([norms[i] for i in good], rel=FP64_EQUAL)
        assert not math.isfinite(rank["norms"][BAD_STEP - 1])
        for name, start, box in rank["boxes"]:
            window = tuple(slice(at, at + size) for at, size in zip(start, box.shape, strict=True))
            assert torch.allclose(box, weights[name][window], rtol=FP64_EQUAL, atol=FP64_EQUAL), name
    assert min(norms) > CLIP, "clipping has to be active to prove anything"


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [({}, 2), ({"shard": 2}, 1), ({"tensor": 2}, 1), ({"pipeline": 2, "schedule": "gpipe"}, 1), ({"shard": 2}, 2)],
)
def test_ranks_agree_on_what_fp16_skips(pool, layout, replicas):
    """From a scale that is too high. Which one is low enough hangs on which rows meet in a micro-batch, for their
    gradient is in fp16 before it is summed: by another layout it is the next one at most."""
    arguments = None, "", "fp16", TOO_HIGH
    one = learn(None, {}, 1, *arguments)
    first, *others = pool.run(learn, replicas * Grid.of(LayoutConfig(**layout)).ranks, layout, replicas, *arguments)
    for rank in others:
        assert all(rank[key] == first[key] for key in ("skipped", "scales", "losses"))
    assert first["skipped"][0] and not all(first["skipped"])
    assert first["scales"][-1] / one["scales"][-1] in (0.5, 1, 2)
    same = min(one["skipped"].index(False), first["skipped"].index(False)) + 1
    assert first["losses"][:same] == pytest.approx(one["losses"][:same], rel=FP16_LOSS)


def test_a_loss_that_is_not_finite_is_skipped_until_the_scale_is_at_its_least():
    """Gradients may be finite where the loss is not: the step is left out all the same."""
    built = tiny(Mesh.alone(), {}, "fp16", Infinite())
    built.replica.loss_scale = LossScale(LossScaleConfig(initial=4.0, least=2.0))
    sync = AllReduce().build(SyncContext(link=LocalLink(), steps=1))
    sync.start(built.replica)
    before = {shard.name: shard.local.clone() for shard in built.replica.shards}
    batches = [objective().batch(rows(1, 4), seed=0, step=1)]
    result = train_step(built.replica, sync, built.schedule, batches, step=1, stop=False)
    assert result.skipped and result.loss == math.inf and math.isfinite(result.gradient_norm)
    with pytest.raises(NonFiniteError, match="loss is inf at step 2"):
        train_step(built.replica, sync, built.schedule, batches, step=2, stop=False)
    assert all(torch.equal(before[shard.name], shard.local) for shard in built.replica.shards)


class Told:
    """An objective that remembers what it was told of the scale."""

    def __init__(self):
        self.scales = set()

    def loss(self, model, batch):
        if torch.is_grad_enabled():  # a pipeline looks at shapes first
            self.scales.add(batch.scale)
        return objective().loss(model, batch)


def told(member, layout):
    with replica(member, Grid.of(LayoutConfig(**layout))) as mesh:
        goal = Told()
        built = tiny(mesh, layout, "fp64", goal)
        goal.scales.clear()
        batches = [objective().batch(rows(step, 2), seed=0, step=step) for step in (1, 2, 3)]
        built.schedule.run(batches, step=1, scale=0.375, expect=built.replica.expect)
        return goal.scales


@pytest.mark.parametrize("layout", [{}, {"shard": 2}, {"pipeline": 2}, {"pipeline": 2, "schedule": "gpipe"}])
def test_losses_are_told_the_scale_in_every_schedule(pool, layout):
    """Those that compute gradients ahead of the backward pass scale them at once."""
    assert all(scales <= {0.375} and scales for scales in pool.run(told, Grid.of(LayoutConfig(**layout)).ranks, layout))


def router_gradients(scale):
    model = pipelines.build("mixtral", 2, output_router_logits=True, router_aux_loss_coef=0.5)
    sample = pipelines.batch_of("causal", 1)
    goal = balanced(model, pipelines.Tokens(), sample, Mesh.alone(), sequence=False)
    schedule = Accumulate(model, goal, seed=0, device=CPU)
    schedule.run([sample], step=1, scale=scale, expect=lambda _: None)
    return {name: p.grad for name, p in model.named_parameters() if "gate.weight" in name}


def test_the_balance_loss_is_scaled_with_the_rest():
    plain, scaled = router_gradients(1.0), router_gradients(1024.0)
    assert plain and all(torch.equal(1024.0 * plain[name], scaled[name]) for name in plain)


class Infinite:
    """An objective whose loss is infinite and whose gradients are not."""

    def loss(self, model, batch):
        return objective().loss(model, batch) + math.inf
