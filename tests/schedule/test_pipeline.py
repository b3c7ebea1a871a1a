"""Pipelines of several processes against one process: loss, every gradient, evaluation, logits; fp64."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from meshes import replica
from paceline.errors import PlanError
from paceline.parallel.precision import Masters
from paceline.parallel.recompute import recompute
from paceline.parallel.shard import ShardedStates
from paceline.parallel.stages import cut_stages
from paceline.plan.layout import Grid
from paceline.plan.stages import KINDS
from paceline.schedule.accumulate import Accumulate
from paceline.schedule.pipeline import Pipelined
from pipelines import FAMILIES, Tokens, batch_of, build
from tolerances import FP32_GRADIENT, FP64_EQUAL

norm = torch.linalg.vector_norm
CPU = torch.device("cpu")
SCALE = 0.01


def micro_batches(head, count):
    """Of uneven lengths; the second has no target at all."""
    return [batch_of(head, i, 7 + i % 3, masked=i == 1) for i in range(count)]


def reference(model, batches):
    """Loss of one process; gradients are left in the model."""
    schedule = Accumulate(model, Tokens(), seed=0, device=CPU)
    return schedule.run(batches, step=1, scale=SCALE, expect=lambda last: None)


def compare(member, family, layers, changes, schedule, count, grid, zero=None, how="none"):
    """What differs most from one process on this rank, in the second of two steps, and what was sent in it."""
    head = FAMILIES[family][0]
    whole, model = build(family, layers, **changes), build(family, layers, **changes)
    batches = micro_batches(head, count)
    expected_loss = reference(whole, batches)
    errors = {}
    with replica(member, Grid(**grid)) as mesh:
        stages = cut_stages(model, mesh, schedule=schedule, sample=batch_of(head, 99, 5))
        if how != "none":
            recompute(model, how)
        sharded = ShardedStates(model, mesh, torch.float64, zero=zero) if zero else None
        runtime = Pipelined(stages, mesh, Tokens(), seed=0, device=CPU)
        for step in (1, 2):
            model.zero_grad()
            mesh.tally.clear()
            told = []
            loss = runtime.run(batches, step=step, scale=SCALE, expect=sharded.expect if sharded else told.append)
        sent = dict(mesh.tally.calls)
        assert sharded or told == [False, True]
        if stages.has_loss:
            errors["loss"] = abs(loss / expected_loss - 1)
        else:
            assert loss == 0.0
        floor = 1e-5 * norm(torch.stack([norm(parameter.grad) for parameter in whole.parameters()]))
        assert stages.elsewhere.isdisjoint(name for name, _ in model.named_parameters())
        for name, parameter in model.named_parameters():
            gradient, held = parameter.grad, stages.held.get(name)
            gradient = gradient.full_tensor() / mesh.shard.size if isinstance(gradient, DTensor) else gradient
            if held is not None:
                gradient = held.summed_over.all_reduce(gradient.clone())
            true = whole.get_parameter(name).grad
            errors[name] = float(norm(gradient - true) / torch.maximum(norm(true), floor))
        model.eval(), whole.eval()
        own = Accumulate(whole, Tokens(), seed=0, device=CPU)
        held_out = batch_of(head, 7, 11, rows=3)
        evaluated = runtime.evaluate(held_out)
        errors["evaluation"] = abs(evaluated / own.evaluate(held_out) - 1) if stages.has_loss else abs(evaluated)
        if head == "causal":
            ids = torch.arange(3, 16)[None]
            errors["logits"] = float(norm(runtime.logits(ids) - own.logits(ids)) / norm(own.logits(ids)))
    worst = max(errors, key=errors.get)
    return worst, errors[worst], len(errors), sent


def assert_equal_to_one_process(results):
    for rank, (worst, error, compared, _) in enumerate(results):
        assert compared > 10 and error <= FP64_EQUAL, f"rank {rank}: {worst} differs by {error:.3g}"


@pytest.mark.parametrize("schedule", KINDS)
def test_every_schedule_with_uneven_stages_and_a_tied_table(pool, schedule):
    tied = {"tie_word_embeddings": True}
    assert_equal_to_one_process(pool.run(compare, 2, "llama", 5, tied, schedule, 6, {"pipeline": 2}))


FOUR = [
    ("llama", 5, {}, "1f1b", 5),
    ("llama", 5, {"tie_word_embeddings": True}, "gpipe", 2),
    ("llama", 9, {"tie_word_embeddings": True}, "interleaved_zero_bubble", 8),
    ("llama", 9, {"tie_word_embeddings": True}, "zbv", 3),
    ("t5", 4, {}, "1f1b", 4),
]


@pytest.mark.parametrize("case", FOUR, ids=[f"{c[0]}-{c[3]}" for c in FOUR])
def test_four_ranks(pool, case):
    assert_equal_to_one_process(pool.run(compare, 4, *case, {"pipeline": 4}))


FAMILY_CASES = [
    ("gpt2", 2, {}, "1f1b"),
    ("gemma2", 4, {}, "interleaved1f1b"),
    ("opt", 3, {}, "gpipe"),
    ("bert", 4, {}, "interleaved_zero_bubble"),
    ("mixtral", 4, {}, "zbv"),
    ("t5", 3, {}, "zbv"),
    ("albert", 5, {}, "dualpipev"),
]


@pytest.mark.parametrize("case", FAMILY_CASES, ids=[f"{c[0]}-{c[3]}" for c in FAMILY_CASES])
def test_families(pool, case):
    assert_equal_to_one_process(pool.run(compare, 2, *case, 4, {"pipeline": 2}))


SHARDED = [("1f1b", 1), ("1f1b", 3), ("interleaved1f1b", 2), ("looped_bfs", 3), ("zbv", 1), ("dualpipev", 2)]


@pytest.mark.parametrize(("schedule", "zero"), SHARDED)
def test_stages_whose_states_are_sharded(pool, schedule, zero):
    tied = {"tie_word_embeddings": True}
    grid = {"pipeline": 2, "shard": 2}
    assert_equal_to_one_process(pool.run(compare, 4, "llama", 4, tied, schedule, 4, grid, zero))


def lost_gradients(member):
    with replica(member, Grid(pipeline=2, shard=2)) as mesh:
        model = build("llama", 4)
        stages = cut_stages(model, mesh, schedule="zbv", sample=batch_of("causal", 99, 5))
        ShardedStates(model, mesh, torch.float64, zero=3)
        runtime = Pipelined(stages, mesh, Tokens(), seed=0, device=CPU)
        with pytest.raises(PlanError, match=r"zero=3 does not go with a schedule that splits the backward pass"):
            runtime.run(micro_batches("causal", 4), step=1, scale=SCALE, expect=lambda _: None)


def test_weights_given_up_before_their_gradients_are_refused(pool):
    pool.run(lost_gradients, 4)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_recompute_in_a_stage(pool, schedule, how):
    assert_equal_to_one_process(pool.run(compare, 2, "llama", 4, {}, schedule, 4, {"pipeline": 2}, None, how))


def test_only_hidden_states_and_their_gradients_are_sent(pool):
    first, last = pool.run(compare, 2, "llama", 2, {}, "1f1b", 4, {"pipeline": 2})
    assert first[3] == {("send", "pipeline", "forward"): 4} and last[3] == {("send", "pipeline", "backward"): 4}


def test_a_schedule_from_a_file(pool, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0F2,,0B0,0B1,0B2\n,1F0,1F1,1F2,1B0,1I1,1W1,1B2\n")
    results = pool.run(compare, 2, "llama", 3, {}, str(path), 3, {"pipeline": 2})
    assert_equal_to_one_process(results)


def masters_gradients(member, schedule):
    """Gradients of the fp32 masters of a model that computes in bf16, of this pipeline and of one process."""
    whole, model = build("llama", 4).float(), build("llama", 4).float()
    batches = micro_batches("causal", 4)
    true = Masters(whole, torch.bfloat16)
    true.on_gradient(lambda name: None)
    reference(whole, batches)
    with replica(member, Grid(pipeline=2)) as mesh:
        stages = cut_stages(model, mesh, schedule=schedule, sample=batch_of("causal", 99, 5))
        masters = Masters(model, torch.bfloat16)
        masters.on_gradient(lambda name: None)
        runtime = Pipelined(stages, mesh, Tokens(), seed=0, device=CPU)
        runtime.run(batches, step=1, scale=SCALE, expect=lambda last: None)
        dtypes = {wire.dtype for borders in runtime._known.values() for wires in borders for wire in wires}
    errors = {}
    for name, master in masters.parameters.items():
        gradient = true.parameters[name].grad
        errors[name] = float(norm(master.grad - gradient) / norm(gradient))
    worst = max(errors, key=errors.get)
    return worst, errors[worst], dtypes


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_zero_bubble"])
def test_bf16_stages_give_their_gradients_to_fp32_masters(pool, schedule):
    """Torch calls no gradient hooks in split backward passes; without them the masters would never learn."""
    for worst, error, dtypes in pool.run(masters_gradients, 2, schedule):
        assert error <= FP32_GRADIENT, f"{worst} differs by {error:.3g}"
        assert dtypes == {torch.bfloat16}


def frozen_gradients(member):
    whole, model = build("llama", 4), build("llama", 4)
    for part in (whole, model):
        for name, parameter in part.named_parameters():
            parameter.requires_grad_("layers.3" in name)
    batches = micro_batches("causal", 2)
    reference(whole, batches)
    with replica(member, Grid(pipeline=2)) as mesh:
        stages = cut_stages(model, mesh, schedule="1f1b", sample=batch_of("causal", 99, 5))
        Pipelined(stages, mesh, Tokens(), seed=0, device=CPU).run(batches, step=1, scale=SCALE, expect=lambda _: None)
    return {
        name: float(norm(parameter.grad - whole.get_parameter(name).grad))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_a_stage_without_anything_to_learn(pool):
    first, last = pool.run(frozen_gradients, 2)
    assert not first and len(last) == 9 and max(last.values()) <= FP64_EQUAL


def looks(member):
    """How often a pipeline had to look at shapes, and how often to ask, when lengths keep changing."""
    with replica(member, Grid(pipeline=2)) as mesh:
        stages = cut_stages(build("t5", 2), mesh, schedule="1f1b", sample=batch_of("seq2seq", 99, 5))
        runtime = Pipelined(stages, mesh, Tokens(), seed=0, device=CPU)
        for step in range(8):
            batches = [batch_of("seq2seq", i, 6 + step + i, rows=1 + step % 3) for i in range(2)]
            runtime.run(batches, step=step, scale=SCALE, expect=lambda _: None)
        return len(runtime._shapes._seen), mesh.tally.calls["all_reduce", "pipeline", "shapes"], len(runtime._known)


def test_shapes_are_looked_at_a_few_times_and_then_told(pool):
    for looked, asked, known in pool.run(looks, 2):
        assert looked <= 4 and asked == 8 and known > 10  # once a step


def too_few(member):
    model = build("llama", 2)
    with replica(member, Grid(pipeline=2)) as mesh:
        stages = cut_stages(model, mesh, schedule="1f1b", sample=batch_of("causal", 99, 5))
        runtime = Pipelined(stages, mesh, Tokens(), seed=0, device=CPU)
        with pytest.raises(PlanError, match=r"schedule=1f1b on pipeline=2 needs at least 2, one for each stage, but"):
            runtime.run(micro_batches("causal", 1), step=1, scale=SCALE, expect=lambda _: None)


def test_a_number_of_micro_batches_that_cannot_be_run_is_refused(pool):
    pool.run(too_few, 2)
