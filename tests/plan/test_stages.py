from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import BatchConfig, LayoutConfig
from paceline.errors import PlanError
from paceline.plan.batch import plan_batch
from paceline.plan.stages import KINDS, balance, check_schedule, schedule_of


def loads(costs, parts, tail):
    found = [sum(costs[part]) for part in parts]
    found[-1] += tail
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 20))
def test_stages_are_as_even_as_neighbours_can_be(costs, stages, tail):
    if len(costs) < stages:
        with pytest.raises(PlanError, match=f"{stages} stages .* only {len(costs)} blocks"):
            balance(costs, stages)
        return
    parts = balance(costs, stages, tail=tail)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(costs)))
    assert len(parts) == stages and all(part.start < part.stop for part in parts)
    ways = [
        loads(costs, [slice(a, b) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)], tail)
        for cuts in combinations(range(1, len(costs)), stages - 1)
    ]
    assert max(loads(costs, parts, tail)) == min(map(max, ways))


def test_layers_that_do_not_divide_and_a_dear_head():
    assert [part.stop - part.start for part in balance([1.0] * 5, 4)] == [1, 1, 1, 2]
    assert balance([1.0] * 6, 2, tail=2.0) == (slice(0, 4), slice(4, 6))
    assert balance([1.0] * 4, 2, tail=100.0) == (slice(0, 3), slice(3, 4))


def test_stages_are_dealt_out_to_ranks():
    assert schedule_of("1f1b", 3).ranks == (0, 1, 2)
    assert schedule_of("looped_bfs", 3).ranks == (0, 1, 2, 0, 1, 2)
    assert schedule_of("zbv", 3).ranks == (0, 1, 2, 2, 1, 0)
    split = {name for name in KINDS if schedule_of(name, 2).splits_backward}
    assert split == {"interleaved_zero_bubble", "zbv", "dualpipev"}


def allowed(name, pipeline, most=12):
    return [count for count in range(1, most + 1) if schedule_of(name, pipeline).allows(count)]


def test_numbers_of_micro_batches():
    assert allowed("gpipe", 4) == allowed("looped_bfs", 4) == allowed("zbv", 4) == list(range(1, 13))
    assert allowed("1f1b", 4) == list(range(4, 13))
    assert allowed("interleaved1f1b", 4) == allowed("interleaved_zero_bubble", 4) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert allowed("dualpipev", 4) == [8, 9, 10, 11, 12]


def check(schedule, sequences=8, micro=1, compiled=False, **layout):
    layout = LayoutConfig(**{"pipeline": 2, "schedule": schedule, **layout})
    check_schedule(layout, plan_batch(BatchConfig(sequences=sequences, micro=micro), 1), compiled=compiled)


def test_what_goes_together_is_let_through():
    for name in KINDS:
        check(name)
        check(name, shard=2, zero=2)
    check("1f1b", shard=2, zero=3, compiled=True)
    check("zbv", shard=1, zero=3)
    check("nothing there is read of", pipeline=1)


def test_too_few_micro_batches_are_refused_with_the_nearest_that_are_enough():
    with pytest.raises(
        PlanError, match=r"schedule=1f1b on pipeline=4 needs at least 4.*has 2 micro.* Use batch.micro=2"
    ):
        check("1f1b", pipeline=4, micro=4)
    with pytest.raises(PlanError, match=r"dualpipev.*at least 8, one for each stage.* Use batch.micro=1"):
        check("dualpipev", pipeline=4, micro=2)
    with pytest.raises(
        PlanError, match=r"interleaved1f1b.*rounds of equal length.* 5 micro-batches.* Use batch.micro=2"
    ):
        check("interleaved1f1b", sequences=15, micro=3)
    with pytest.raises(PlanError, match=r"No batch.micro gives that with batch.sequences=3"):
        check("1f1b", pipeline=4, sequences=3)


@pytest.mark.parametrize("axis", ["shard", "context"])
def test_late_gradients_of_weights_that_are_given_up_are_refused(axis):
    with pytest.raises(
        PlanError, match=r"zbv computes the gradients of weights apart.*zero=3.* Use zero=2, or schedule"
    ):
        check("zbv", zero=3, **{axis: 2})


def test_late_gradients_of_compiled_blocks_are_refused():
    with pytest.raises(PlanError, match=r"dualpipev.*compiled blocks cannot. Use train.compile=false"):
        check("dualpipev", compiled=True)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(PlanError, match=r"layout.schedule='2f2b': expected one of gpipe, 1f1b, .*, or a CSV file"):
        check("2f2b")


V = "0F0,0F1,,3F0,3I0,0B0,3W0,3F1,3B1,0B1\n,1F0,2F0,1F1,2F1,2B0,1B0,,2B1,1B1\n"


def write(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return str(path)


def test_a_file_says_which_rank_runs_a_stage(tmp_path):
    schedule = schedule_of(write(tmp_path, V), 2)
    assert schedule.ranks == (0, 1, 1, 0) and schedule.splits_backward and schedule.fixed_micro_batches == 2
    assert [count for count in range(1, 5) if schedule.allows(count)] == [2]
    plain = write(tmp_path, V.replace("3I0", "3B0").replace("3W0", "").replace("0B0", "(0B0;)OVERLAP_F_B"))
    assert not schedule_of(plain, 2).splits_backward


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (V.replace("0B1", "0G1"), r"'0G1' is no action; expected stage, F, B, I or W, micro-batch"),
        (V.replace("0B1", "0SEND_F1"), r"'0SEND_F1' is no action"),
        (V + V, r"has 4 lines; expected one for each of pipeline=2"),
        (V.replace("0B1", ""), r"each of 4 stages has to run each of 2 micro-batches once forward"),
        (V.replace("3W0", ""), r"each of 4 stages has to run each of 2 micro-batches once forward"),
        (V.replace("1B1", "1B1,0F2").replace("0B1", "0B1,0B2"), r"each of 4 stages has to run each of 3"),
        (V.replace("2F0,", "").replace("0F1", "0F1,2F0"), r"a stage stands on two lines"),
        (
            V.replace("3F0", "x").replace("3F1", "3F0").replace("x", "3F1"),
            r"the last stage has to run .* in their order",
        ),
        ("", r"has 0 lines"),
    ],
)
def test_files_that_make_no_schedule_are_refused(tmp_path, text, message):
    with pytest.raises(PlanError, match=message):
        schedule_of(write(tmp_path, text), 2)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(PlanError, match=r"layout.schedule=none.csv: cannot be read"):
        schedule_of("none.csv", 2)
