import torch

from meshes import replica
from paceline.plan.layout import Grid


def lines(member):
    """Which ranks are on each of a rank's lines, and what rows travel between those of different experts."""
    with replica(member, Grid(shard=2, context=2, expert=2)) as mesh:
        rank = torch.tensor([member.index])
        on = {axis: getattr(mesh, axis).all_gather(rank, 0).tolist() for axis in ("states", "expert", "expert_states")}
        assert mesh.expert_states_mesh.size() == mesh.expert_states.size == 2
        sent, received = ([0, 2], [0, 0]) if mesh.expert.index == 0 else ([0, 0], [2, 0])
        rows = torch.tensor([[member.index, 1], [member.index, 2]])[: sum(sent)]
        got = mesh.expert.exchange_rows(rows, sent, received, where="here")
        assert mesh.tally.bytes["all_to_all", "expert", "here"] == rows.nbytes
        return on, got.tolist()


def test_experts_are_dealt_out_to_neighbours(pool):
    """Two and two have all experts; the first and third, the second and fourth have the same ones."""
    on, got = zip(*pool.run(lines, 4), strict=True)
    assert [line["states"] for line in on] == [[0, 1, 2, 3]] * 4
    assert [line["expert"] for line in on] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [line["expert_states"] for line in on] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert list(got) == [[], [[0, 1], [0, 2]], [], [[2, 1], [2, 2]]]


def unsharded(member):
    with replica(member, Grid(shard=2, expert=2)) as mesh:
        return mesh.expert_states.size, mesh.expert_states_mesh.size(), mesh.expert_states.group is None


def test_all_ranks_may_hold_different_experts(pool):
    assert pool.run(unsharded, 2) == [(1, 1, True)] * 2
