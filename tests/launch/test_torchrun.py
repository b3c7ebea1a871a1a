import pytest

from paceline.errors import PlanError
from paceline.launch import torchrun

STARTED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_who_this_process_is():
    assert torchrun.started_by_torchrun(STARTED) and not torchrun.started_by_torchrun({"RANK": "0"})
    place = torchrun.coordinates(4, 1, STARTED)
    assert (place.replica, place.replicas, place.rank, place.local_rank, place.local_ranks) == (3, 4, 0, 1, 2)
    sharded = torchrun.coordinates(2, 2, STARTED)
    assert (sharded.replica, sharded.rank, sharded.ranks, sharded.global_rank) == (1, 1, 2, 3)
    assert not sharded.is_leader


def test_another_number_of_processes_is_refused():
    with pytest.raises(PlanError, match=r"torchrun started 4 processes, but replicas=2 .* set replicas=4"):
        torchrun.coordinates(2, 1, STARTED)


def test_the_store_is_the_agents_where_there_is_one():
    place = torchrun.coordinates(4, 1, STARTED)
    with torchrun.rendezvous(place, {**STARTED, "TORCHELASTIC_USE_AGENT_STORE": "True"}) as at:
        assert (at.host, at.port, at.loopback, at.attempt) == ("10.0.0.1", 29500, False, "0")


def test_a_restart_speaks_under_other_keys():
    place = torchrun.coordinates(4, 1, STARTED)
    with torchrun.rendezvous(place, {**STARTED, "TORCHELASTIC_RESTART_COUNT": "2"}) as at:
        assert at.attempt == "2"
