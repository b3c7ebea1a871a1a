from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from paceline.checkpoint import Checkpoint, Kind, Rule, TensorState, tensor_state

Save = Callable[..., Checkpoint]


def as_each_rank(mesh_shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    """The same mesh as seen by each of its ranks, one after the other, without other processes."""
    n = int(torch.Size(mesh_shape).numel())
    for rank in range(n):
        dist.init_process_group("fake", rank=rank, world_size=n, store=FakeStore())
        try:
            yield init_device_mesh("cpu", mesh_shape)
        finally:
            dist.destroy_process_group()


def cut(full: torch.Tensor, mesh_shape: tuple[int, ...], placements: Sequence[Placement]) -> list[TensorState]:
    return [
        tensor_state(distribute_tensor(full.clone(), mesh, placements, src_data_rank=None))
        for mesh in as_each_rank(mesh_shape)
    ]


PLACEMENTS = {
    "FSDP": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "rowwise under FSDP": ((2, 2), [Shard(0), Shard(1)]),
    "colwise under FSDP": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "norm under FSDP": ((2, 2), [Shard(0), Replicate()]),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "fused projection": ((2,), [_StridedShard(0, split_factor=2)]),
    "fused projection, 4 ranks": ((4,), [_StridedShard(0, split_factor=2)]),
    "strided columns": ((2,), [_StridedShard(1, split_factor=2)]),
    "three axes": ((2, 2, 2), [Replicate(), Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("rows", [12, 10, 7, 1])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_dtensor_is_saved_and_restored_under_any_placements(save: Save, name: str, rows: int) -> None:
    full = torch.arange(rows * 6.0).view(rows, 6)
    saved = save([{"w": state} for state in cut(full, *PLACEMENTS[name])])
    assert torch.equal(saved.tensor("w"), full)
    expected = cut(full, *PLACEMENTS[name])
    for place, value in zip(cut(torch.full_like(full, -1), *PLACEMENTS[name]), expected, strict=True):
        saved.restore({"w": place}, layout={})
        assert torch.equal(place.tensor, value.tensor)


def test_saved_under_two_by_two_restored_under_fsdp_alone(save: Save) -> None:
    full = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    saved = save([{"w": state} for state in cut(full, *PLACEMENTS["colwise under FSDP"])])
    for place, value in zip(cut(torch.zeros(10, 6), *PLACEMENTS["FSDP"]), cut(full, *PLACEMENTS["FSDP"]), strict=True):
        saved.restore({"w": place}, layout={})
        assert torch.equal(place.tensor, value.tensor)


def test_a_fused_projection_is_two_boxes() -> None:
    first, second = cut(torch.zeros(8, 3), *PLACEMENTS["fused projection"])
    assert [(b.start, b.shape, b.inner) for b in first.blocks] == [((0, 0), (2, 3), (0, 0)), ((4, 0), (2, 3), (2, 0))]
    assert [(b.start, b.shape, b.inner) for b in second.blocks] == [((2, 0), (2, 3), (0, 0)), ((6, 0), (2, 3), (2, 0))]


def test_copies_inside_a_mesh_and_outside_of_it_are_counted_together() -> None:
    holders = []
    for mesh in as_each_rank((2, 2)):
        tensor = distribute_tensor(torch.zeros(4), mesh, [Shard(0), Replicate()], src_data_rank=None)
        holders += [tensor_state(tensor, holder=(replica, 3)).holder for replica in range(3)]
    assert holders == [(0, 6), (2, 6), (4, 6), (1, 6), (3, 6), (5, 6)] * 2


def test_describing_a_dtensor_sends_nothing() -> None:
    for mesh in as_each_rank((2, 2)):
        tensor = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0), Shard(1)], src_data_rank=None)
        with CommDebugMode() as messages:
            tensor_state(tensor)
        assert messages.get_total_counts() == 0


def test_a_value_that_is_not_yet_reduced_is_a_mistake() -> None:
    for mesh in as_each_rank((2,)):
        tensor = distribute_tensor(torch.zeros(4), mesh, [Replicate()], src_data_rank=None)
        partial = type(tensor).from_local(tensor.to_local(), mesh, [Partial()])
        with pytest.raises(AssertionError, match="reduce it first"):
            tensor_state(partial)


def test_state_is_the_memory_of_the_tensor_itself() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    tensor_state(parameter).tensor.fill_(2)
    tensor_state(parameter, Kind.PER_REPLICA, rule=Rule.FRESH, place=(0, 2)).tensor[0, 1] = 5
    assert parameter.tolist() == [2, 5, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": Kind.PER_REPLICA, "place": (0, 2)}, "rule"),
        ({"kind": Kind.PARAMETER, "rule": Rule.MEAN}, "rule"),
        ({"kind": Kind.PER_REPLICA, "rule": Rule.MEAN}, "place"),
        ({"kind": Kind.OPAQUE}, "place"),
        ({"kind": Kind.PARAMETER, "place": (0, 2)}, "place"),
        ({"full_shape": (8,)}, "start"),
        ({"kind": Kind.REPLICATED, "full_shape": (8,), "start": (0,)}, "replicated state is whole"),
    ],
)
def test_descriptions_that_make_no_sense_are_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        tensor_state(torch.zeros(4), **arguments)  # type: ignore[arg-type]


def test_whole_numbers_have_no_mean() -> None:
    with pytest.raises(AssertionError, match=r"no mean of torch\.int64"):
        tensor_state(torch.zeros(4, dtype=torch.int64), Kind.PER_REPLICA, rule=Rule.MEAN, place=(0, 2))
