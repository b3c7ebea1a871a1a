import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import BatchConfig, LayoutConfig
from paceline.errors import PlanError
from paceline.plan.batch import plan_batch
from paceline.plan.layout import AXES, ranks_per_replica
from paceline.plan.memory import rank_memory
from paceline.plan.model import ModelSizes


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


@pytest.mark.parametrize("axis", AXES)
def test_layouts_that_are_not_built_are_refused_by_name(axis):
    assert ranks_per_replica(LayoutConfig()) == 1
    with pytest.raises(PlanError, match=f"layout.{axis}=2"):
        ranks_per_replica(LayoutConfig(**{axis: 2}))


def test_memory_of_mixed_precision_is_18_bytes_a_parameter():
    """fp32 master 4, bf16 copy 2, fp32 gradient 4, Adam 8."""
    model = ModelSizes(parameters=1000, trainable=1000, layers=2, width=8, vocabulary=50)
    batch = plan_batch(BatchConfig(sequences=2, sequence_tokens=16), 1)
    bf16 = rank_memory(model, batch, precision="bf16", recompute="none", state_per_parameter=2, sync_bytes=0)
    fp32 = rank_memory(model, batch, precision="fp32", recompute="none", state_per_parameter=2, sync_bytes=0)
    assert bf16.states == 18 * 1000 and fp32.states == 16 * 1000
    assert bf16.activations_estimate == 34 * 32 * 8 * 2 and fp32.activations_estimate == 2 * bf16.activations_estimate
    full = rank_memory(model, batch, precision="bf16", recompute="full", state_per_parameter=2, sync_bytes=0)
    assert full.activations_estimate == bf16.activations_estimate // 17


def test_flops_do_not_count_a_table_that_is_only_looked_up():
    tied = ModelSizes(parameters=100, trainable=100, layers=1, width=4)
    untied = ModelSizes(parameters=140, trainable=140, lookup_parameters=40, layers=1, width=4)
    assert tied.flops_per_token(8) == untied.flops_per_token(8) == 6 * 100 + 12 * 4 * 8
