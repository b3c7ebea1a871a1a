"""Full tensors from parts that ranks hold: of DTensors, of cut and padded parameters, and of copies."""

import pytest
import torch
from torch import nn

from meshes import replica
from paceline.comm.boxes import block, whole
from paceline.parallel.boxes import part_of
from paceline.parallel.full import FullTensors
from paceline.parallel.held import Cut, Held, cut_runs, take
from paceline.parallel.shard import ShardedStates
from paceline.plan.layout import Grid

SHAPES = {"padded": (5, 6), "fused": (8, 3), "halves": (6, 4), "stack": (4, 3, 2), "copy": (7,), "columns": (3, 10)}
CUTS = {"padded": [(0, [5])], "fused": [(0, [4, 4])], "halves": [(1, [2, 2])], "columns": [(1, [10])]}


def full_of(name):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def parts(mesh):
    """A module whose parameters are cut over ``tensor``, and then sharded; and what is said of them."""
    model, held = nn.Module(), {}
    for name in SHAPES:
        local, cuts = full_of(name), []
        for dim, sizes in CUTS.get(name, []):
            runs = cut_runs(sizes, mesh.tensor.size, mesh.tensor.index)
            local = take(local, dim, runs, sum(-(-size // mesh.tensor.size) for size in sizes))
            cuts.append(Cut(dim, runs))
        if cuts:
            held[name] = Held(full_shape=SHAPES[name], cuts=tuple(cuts))
        model.register_parameter(name, nn.Parameter(local))
    if mesh.states_mesh is not None:
        return ShardedStates(model, mesh, torch.float64, zero=3).parameters, held
    return dict(model.named_parameters()), held


def local_of(parameter):
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()


def exercise(member, sizes):
    with replica(member, Grid(**sizes)) as mesh:
        parameters, held = parts(mesh)
        full = FullTensors.of(parameters, held, mesh, device=torch.device("cpu"))
        local = {name: local_of(parameter) for name, parameter in parameters.items()}
        owner = full.owners(SHAPES, cost=lambda shape: float(torch.Size(shape).numel()))
        gathered = full.gather(local, owner)
        assert gathered.keys() == {name for name in SHAPES if owner[name] == full.index}
        assert all(tensor.equal(full_of(name)) for name, tensor in gathered.items())
        back = full.scatter({name: 2 * tensor for name, tensor in gathered.items()}, local, owner)
        assert all(back[name].equal(2 * local[name]) for name in SHAPES), "padding stays zero"
        for name in SHAPES:
            for dim in range(len(SHAPES[name])):
                (sums,) = full.total([full.sums(name, local[name], dim)])
                torch.testing.assert_close(sums, full_of(name).sum(dim), rtol=1e-12, atol=1e-12)
                own = full.part_of_sums(name, sums, local[name], dim).expand(local[name].shape)
                expected = full_of(name).sum(dim, keepdim=True).expand(SHAPES[name])
                for box in full.part(name).blocks:
                    torch.testing.assert_close(box.of(own), box.of_full(expected), rtol=1e-12, atol=1e-12)
        rows = local["halves"].abs().amax(-1, keepdim=True) if local["halves"].numel() else local["halves"][..., :1]
        greatest = full.greatest("halves", rows)
        for box in full.part("halves").blocks:
            first, size = box.start[0], box.shape[0]
            got = greatest[box.inner[0] : box.inner[0] + size, 0]
            assert got.equal(full_of("halves").abs().amax(-1)[first : first + size])
        columns = full.columns("columns", local["columns"].shape[-1])
        return {
            "owner": owner,
            "counts": {name: full.counts(name) for name in SHAPES},
            "copies of": {name: full.holder(name)[1] for name in SHAPES},
            "columns": None if columns is None else columns.tolist(),
            "rows": {name: full.part_of_rows(name, 1).full_shape for name in SHAPES},
        }


@pytest.mark.parametrize("sizes", [{"shard": 2}, {"tensor": 2}, {"shard": 2, "tensor": 2}, {"shard": 4}])
def test_what_comes_together_is_the_whole_and_each_gets_its_part(pool, sizes):
    ranks = torch.Size(sizes.values()).numel()
    told = pool.run(exercise, ranks, sizes)
    assert all(each["owner"] == told[0]["owner"] for each in told)
    assert set(told[0]["owner"].values()) == set(range(ranks)), "all have something to do"
    copies = sizes.get("tensor", 1)
    assert all(each["copies of"]["copy"] in {copies, ranks} for each in told)
    for name in SHAPES:
        assert any(each["counts"][name] for each in told)
    assert [each["columns"] for each in told[:2]] == (
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] if "tensor" in sizes else [None, None]
    )


def test_the_costliest_go_to_those_with_the_least_to_do():
    full = FullTensors.alone({name: torch.empty(shape) for name, shape in SHAPES.items()})
    assert set(full.owners(SHAPES, cost=len).values()) == {0}
    assert full.ranks == 1 and full.counts("copy") and full.holder("copy") == (0, 1)


def lose_a_box(member):
    with replica(member, Grid(tensor=2)) as mesh:
        held = Held(full_shape=(6,), cuts=(Cut(0, cut_runs([6], 2, 0)),))  # both say that they have the first half
        with pytest.raises(AssertionError, match="the boxes of w are not all of it once"):
            FullTensors.of({"w": torch.zeros(3)}, {"w": held}, mesh, device=torch.device("cpu"))
    return True


def test_boxes_that_are_not_the_whole_are_a_mistake(pool):
    assert pool.run(lose_a_box, 2) == [True, True]


def test_parts_of_plain_tensors():
    assert part_of(torch.zeros(2, 3), None) == whole((2, 3))
    held = Held(full_shape=(2, 6), cuts=(Cut(1, cut_runs([3, 3], 3, 1)),))
    cut = part_of(torch.zeros(2, 2), held)
    assert [(b.start, b.shape, b.inner) for b in cut.blocks] == [((0, 1), (2, 1), (0, 0)), ((0, 4), (2, 1), (0, 1))]
    assert block((2,), (5,)).of_full(torch.arange(9)).tolist() == [5, 6]
