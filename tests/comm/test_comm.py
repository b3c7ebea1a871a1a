import pytest
import torch

from paceline.comm.device import Device, claim, cores, matmul_flops_per_s, units
from paceline.comm.link import LocalLink
from paceline.comm.ranks import ALONE, Coordinates
from paceline.comm.world import Rendezvous, join
from paceline.errors import LinkError, PlanError
from paceline.plan.layout import Grid
from paceline.plan.wire import all_reduce_bytes, direct_bytes


def test_ranks_of_a_replica_are_neighbours():
    places = [Coordinates.of(r, replicas=3, ranks=2, local_rank=r, local_ranks=6) for r in range(6)]
    assert [(p.replica, p.rank) for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [p.global_rank for p in places] == list(range(6)) and places[0].global_ranks == 6
    assert [p.is_leader for p in places] == [True] + [False] * 5


def test_the_processor_is_claimed_with_its_share_of_cores():
    device = claim(ALONE)
    assert device.torch_device == torch.device("cpu") and device.backend == "gloo"
    assert device.threads == torch.get_num_threads() == 1  # OMP_NUM_THREADS of the tests
    assert device.units == units(torch.device("cpu")) <= {"bf16", "fp16"}
    assert cores() >= 1 and device.name


def test_threads_of_several_levels_and_none_at_all(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    assert claim(ALONE).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(PlanError, match="OMP_NUM_THREADS='many'"):
        claim(ALONE)


def test_the_measured_peak_is_a_speed():
    device = Device(torch_device=torch.device("cpu"), backend="gloo", name="x", units=frozenset(), threads=1)
    assert 1e8 < matmul_flops_per_s(device, torch.float32, size=128, seconds=0.01) < 1e15


@pytest.mark.parametrize(
    ("n_bytes", "size", "expected"),
    [(1000, 1, 0), (1000, 2, 1000), (2**24, 2, 2**24), (1000, 4, 3000), (10**6, 4, 1_500_000), (600, 64, 1181)],
)
def test_bytes_of_a_sum(n_bytes, size, expected):
    """Small ones directly, as long as that sends little more than a ring."""
    assert all_reduce_bytes(n_bytes, size) == expected
    assert (size - 1) * direct_bytes(size) - 2 * (size - 1) * direct_bytes(size) // size <= 2**15 + size


def test_a_link_to_nobody_sends_nothing():
    tensor = torch.ones(3)
    LocalLink().all_reduce(tensor).wait()
    LocalLink().broadcast(tensor).wait()
    assert torch.equal(tensor, torch.ones(3)) and LocalLink().sent_bytes == 0


def test_a_single_process_joins_without_a_store():
    with join(ALONE, claim(ALONE), None, Grid()) as world:
        assert isinstance(world.link, LocalLink) and world.store is None


def test_a_store_nobody_hosts_is_a_link_error():
    with pytest.raises(LinkError, match="does not answer"):
        Rendezvous(port=1, timeout_s=1.0).connect()


def test_a_port_can_be_hosted_once():
    store = Rendezvous().host_store()
    with pytest.raises(PlanError, match=rf"train.port={store.port} cannot be opened"):
        Rendezvous(port=store.port).host_store()
