import pytest

from paceline.config import Config
from paceline.errors import PlanError
from paceline.plan.run import plan_run


def config(sequences=8, micro=None, compiled=False, replicas=1, **layout):
    return Config.parse(
        {
            "data": {"source": "unused"},
            "batch": {"sequences": sequences, "sequence_tokens": 16, "micro": micro},
            "train": {"steps": 1, "compile": compiled},
            "replicas": replicas,
            "layout": layout,
        }
    )


def test_shards_and_replicas_learn_from_rows_of_their_own_and_other_axes_do_not():
    grid, batch = plan_run(config(replicas=2, shard=2, tensor=3, context=2))
    assert grid.ranks == 12 and batch.data_parallel == 4 and batch.micro == 2


@pytest.mark.parametrize(("sequences", "expected"), [(16, 4), (8, 2), (3, 1)])
def test_a_pipeline_gets_two_micro_batches_a_rank_where_there_are_enough_rows(sequences, expected):
    _, batch = plan_run(config(sequences, pipeline=2))
    assert batch.micro == expected


def test_micro_stays_as_the_config_says():
    _, batch = plan_run(config(8, micro=1, pipeline=2))
    assert batch.micro == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sequences": 1, "pipeline": 2}, "needs at least 2"),
        ({"pipeline": 2, "schedule": "2f2b"}, "schedule='2f2b'"),
        ({"tensor": 2, "compiled": True}, "train.compile=true with layout.tensor=2"),
        ({"sequence": True}, "layout.sequence=true"),
        ({"pipeline": 2, "schedule": "zbv", "shard": 2}, "zero=2"),
        ({"expert": 2}, "layout.expert=2"),
        ({"tensor_patterns": {"up": "column"}}, "Set layout.tensor"),
        ({"shard": 2, "expert": 2, "compiled": True}, "train.compile=true with layout.expert=2"),
        ({"offload": True}, "layout.shard=1 shares nothing"),
        ({"offload": True, "shard": 2, "replicas": 2}, "Use replicas=1 and layout.shard=4"),
    ],
)
def test_what_does_not_go_together_is_refused(options, expected):
    with pytest.raises(PlanError) as error:
        plan_run(config(**options))
    assert expected in str(error.value)
