"""The batch that grows: how many sequences each step has, and how they are dealt out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import BatchConfig, BatchWarmup, Config
from paceline.errors import ConfigError, PlanError
from paceline.plan.batch import sequences_of
from paceline.plan.run import plan_batches, plan_run


def config(start=4, steps=10, by=1, sequences=16, **sections):
    tree = {
        "data": {"source": "unused"},
        "batch": {"sequences": sequences, "warmup": {"start": start, "steps": steps, "by": by}},
        "train": {"steps": 100},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if key in tree else value
    return Config.parse(tree)


@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 70), st.integers(1, 300))
def test_it_begins_where_it_should_grows_and_is_full_after_its_steps(start, more, by, steps):
    batch = BatchConfig(sequences=start + more, warmup=BatchWarmup(start=start, steps=steps, by=by))
    sizes = [sequences_of(batch, step) for step in range(1, steps + 3)]
    assert sizes[0] == start and sizes[-2:] == [start + more] * 2 and sizes == sorted(sizes)
    assert all(size < start + more for size in sizes[:steps]), "the warm-up is as long as it says"
    assert all((size - start) % by == 0 for size in sizes[:steps])


def test_rises_are_at_even_distances():
    batch = BatchConfig(sequences=16, warmup=BatchWarmup(start=4, steps=9, by=4))
    assert [sequences_of(batch, step) for step in range(1, 12)] == [4, 4, 4, 8, 8, 8, 12, 12, 12, 16, 16]
    assert sequences_of(BatchConfig(sequences=5), 1) == 5


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 10), (3, 30), (11, 12), (20, 19), (1, 0)])
def test_sums_over_steps(first, last):
    batches = plan_batches(config(steps=10, by=3))
    assert batches.sequences(first, last) == sum(batches.at(step).sequences for step in range(first, last + 1))


def test_a_micro_batch_is_a_rank_s_share_where_that_is_smaller():
    batches = plan_batches(config(start=4, steps=12, by=4, replicas=2, batch={"micro": 4}))
    found = [(plan.sequences, plan.micro, plan.micro_batches) for plan in (batches.at(step) for step in (1, 5, 9, 13))]
    assert found == [(4, 2, 1), (8, 4, 1), (12, 4, 2), (16, 4, 2)]


def test_a_pipeline_gets_its_micro_batches_in_every_step():
    batches = plan_batches(config(start=4, steps=12, by=4, layout={"pipeline": 2}))
    found = [(plan.micro, plan.micro_batches) for plan in (batches.at(step) for step in (1, 5, 9, 13))]
    assert found == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_fewer_sequences_than_ranks_in_some_step_are_refused_with_the_step():
    with pytest.raises(PlanError, match=r"batch.warmup gives step 1 a batch of 4: .* 5 data-parallel ranks"):
        plan_run(config(replicas=5))
    with pytest.raises(PlanError, match=r"step 1 a batch of 1: .*needs at least 2"):
        plan_run(config(start=1, layout={"pipeline": 2}))


def test_a_warm_up_that_does_not_grow_is_refused():
    with pytest.raises(ConfigError, match=r"warmup.start=16 is not below sequences=16"):
        config(start=16)
