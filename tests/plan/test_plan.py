import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import BatchConfig, LayoutConfig
from paceline.errors import PlanError
from paceline.plan.batch import plan_batch
from paceline.plan.layout import Grid
from paceline.plan.memory import rank_memory
from paceline.plan.model import ModelSizes
from paceline.plan.precision import PRECISIONS


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 50))
def test_every_sequence_has_one_place(sequences, ranks, micro):
    if sequences < ranks:
        with pytest.raises(PlanError, match="fewer than"):
            plan_batch(BatchConfig(sequences=sequences), ranks)
        return
    share = -(-sequences // ranks)
    if micro > share:
        with pytest.raises(PlanError, match=f"share of {share}"):
            plan_batch(BatchConfig(sequences=sequences, micro=micro), ranks)
        return
    plan = plan_batch(BatchConfig(sequences=sequences, micro=micro), ranks)
    places = plan.data_parallel * plan.micro_batches * plan.micro
    assert places - plan.filling == sequences
    assert plan.micro_batches * plan.micro < share + micro  # never a micro-batch more than needed
    assert plan.tokens == sequences * 512


def test_default_micro_batch_is_the_whole_share():
    plan = plan_batch(BatchConfig(sequences=7, sequence_tokens=10), 2)
    assert (plan.micro, plan.micro_batches, plan.filling) == (4, 1, 1)


def test_places_fill_the_grid_with_tensor_fastest():
    grid = Grid(pipeline=2, shard=3, context=1, tensor=2)
    places = [grid.place(rank) for rank in range(grid.ranks)]
    assert grid.ranks == 12 and len(set(map(repr, places))) == 12
    assert [p.tensor for p in places[:4]] == [0, 1, 0, 1] and [p.shard for p in places[:6]] == [0, 0, 1, 1, 2, 2]
    assert places[6].pipeline == 1 and grid.cuts(7) == [("pipeline", 1, 2), ("shard", 0, 3), ("tensor", 1, 2)]


def test_experts_are_dealt_out_to_neighbours_in_shard_and_context():
    grid = Grid.of(LayoutConfig(shard=2, context=2, tensor=2, expert=2))
    assert grid.ranks == 8 and grid.states == 4
    assert [grid.place(rank).expert for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert grid.cuts(7)[-1] == ("expert", 1, 2)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"expert": 2}, "the 1 ranks of shard=1 x context=1 that experts are dealt out to. Use expert=1, or shard=2"),
        ({"expert": 2, "shard": 3}, "Use expert=3, or shard=4"),
        ({"expert": 4, "shard": 2, "context": 3}, "Use expert=3, or shard=4"),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_refused_with_the_nearest_number(sizes, expected):
    with pytest.raises(PlanError) as error:
        Grid.of(LayoutConfig(**sizes))
    assert expected in str(error.value)


ONE = Grid()


def memory(precision="bf16", grid=ONE, zero=3, recompute="none", logit_rows=None, experts=0):
    model = ModelSizes(parameters=1000, trainable=1000, experts=experts, layers=2, width=8, vocabulary=50)
    batch = plan_batch(BatchConfig(sequences=2 * grid.shard, sequence_tokens=16), grid.shard)
    return rank_memory(
        model,
        batch,
        grid=grid,
        zero=zero,
        precision=PRECISIONS[precision],
        recompute=recompute,
        optimizer_bytes=8 * 1000,
        sync_bytes=0,
        logit_rows=logit_rows,
    )


def test_memory_of_mixed_precision_is_18_bytes_a_parameter():
    """fp32 master 4, bf16 copy 2, fp32 gradient 4, Adam 8."""
    bf16, fp32 = memory(), memory("fp32")
    assert bf16.states == 18 * 1000 and fp32.states == 16 * 1000
    assert bf16.activations_estimate == 34 * 32 * 8 * 2 and fp32.activations_estimate == 2 * bf16.activations_estimate
    assert memory(recompute="full").activations_estimate == bf16.activations_estimate // 17


def test_selective_recompute_keeps_what_lies_between_none_and_full():
    full, selective, none = (memory(recompute=how).activations_estimate for how in ("full", "selective", "none"))
    assert full < selective < none


def test_logits_are_there_at_once_or_some_rows_at_a_time():
    """32 positions: all with their gradient; or 10 of them and their fp32 copy, and the gradient of the head."""
    assert memory().logits_estimate == 2 * 32 * 50 * 2
    assert memory(logit_rows=10).logits_estimate == 10 * 50 * (2 + 4) + 4 * 50 * 8
    assert memory(logit_rows=64).logits_estimate == 32 * 50 * (2 + 4) + 4 * 50 * 8


def test_memory_of_shards_follows_what_zero_shares():
    four = Grid(shard=4)
    third, second, first = (memory(grid=four, zero=zero) for zero in (3, 2, 1))
    assert (third.master_weights, third.gradients, third.optimizer) == (1000, 1000, 2000)
    assert (third.compute_weights, second.compute_weights) == (2 * 500, 2 * 1000), "a block, and the whole"
    assert second.gradients == 1000 and first.gradients == 4000
    assert memory("fp32", Grid(tensor=2)).states == 16 * 500


def test_memory_of_experts_that_are_dealt_out():
    """A rank gathers, and before they are summed has gradients of, its own experts alone: 200 + 800 / 4."""
    whole, dealt = (memory(grid=Grid(shard=4, expert=n), zero=1, experts=800) for n in (1, 4))
    assert (whole.compute_weights, dealt.compute_weights) == (2 * 1000, 2 * 400)
    assert (whole.gradients, dealt.gradients) == (4 * 1000, 4 * 400)
    assert (dealt.master_weights, dealt.optimizer) == (whole.master_weights, whole.optimizer) == (1000, 2000)


def test_flops_do_not_count_a_table_that_is_only_looked_up():
    tied = ModelSizes(parameters=100, trainable=100, layers=1, width=4)
    untied = ModelSizes(parameters=140, trainable=140, lookup_parameters=40, layers=1, width=4)
    assert tied.flops_per_token(8) == untied.flops_per_token(8) == 6 * 100 + 12 * 4 * 8
