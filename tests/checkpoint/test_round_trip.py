import itertools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paceline.checkpoint import (
    Checkpoint,
    Checkpointer,
    Kind,
    LocalExchange,
    Rule,
    TensorState,
    load,
    needed_bytes,
    tensor_state,
)
from paceline.checkpoint.snapshot import DTYPES
from paceline.errors import CheckpointError

Save = Callable[..., Checkpoint]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bit pattern, NaN among them; only 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.Size(shape).numel()) * dtype.itemsize
    top = 2 if dtype is torch.bool else 256
    return torch.randint(0, top, (n,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return t.dtype, tuple(t.shape), bytes(t.contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(save: Save, dtype: torch.dtype) -> None:
    tensors = {f"model/{len(shape)}": random_bits(dtype, shape) for shape in [(), (5,), (4, 3), (2, 3, 4)]}
    saved = save({name: tensor_state(t) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        assert bits(saved.tensor(name)) == bits(tensor)
    assert bits(saved.slice("model/2", (1, 1), (2, 2))) == bits(tensors["model/2"][1:3, 1:3])


def test_mixed_dtypes_scalars_and_empty_tensors_share_a_file(save: Save) -> None:
    tensors = {
        "a": torch.tensor(True),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.arange(3, dtype=torch.bfloat16),
        "d": torch.zeros(0, 4),
        "e": torch.arange(7, dtype=torch.uint8),
        "f": torch.tensor(0.1, dtype=torch.float64),
        "g": torch.zeros(3, 0, 2, dtype=torch.int32),
    }
    saved = save({name: tensor_state(t) for name, t in tensors.items()})
    assert saved.names == sorted(tensors)
    for name, tensor in tensors.items():
        assert bits(saved.tensor(name)) == bits(tensor)


def test_a_strided_tensor_is_saved_by_its_values(save: Save) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(save({"t": tensor_state(tensor)}).tensor("t"), tensor)


def test_files_are_plain_safetensors(save: Save, tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    save({"model/w": tensor_state(tensor)})
    path = tmp_path / "step-00000100" / "rank-00000.safetensors"
    assert torch.equal(load_file(path)["model/w"], tensor)
    header_bytes = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert header_bytes % 8 == 0


def test_values_come_back_exactly(save: Save) -> None:
    floats = [0.1, 1 / 3, 1e-308, 5e-324, -0.0, 1.7976931348623157e308, 2**53 + 1, 1.0]
    values = {"floats": floats, "text": "Größe \u2028", "big": 2**200, "none": None, "yes": True, "nested": {"a": [{}]}}
    back = save({}, values=values).values
    assert back == values
    assert [struct.pack("<d", x) for x in back["floats"]] == [struct.pack("<d", x) for x in floats]  # type: ignore[union-attr, arg-type]
    assert [type(x) for x in back["floats"]] == [type(x) for x in floats]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "value", [(1, 2), {1: "a"}, float("nan"), float("inf"), {1, 2}, torch.tensor(1), [1, (2,)], {"a": {2: 3}}], ids=repr
)
def test_values_that_json_would_change_are_refused(save: Save, tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="'loss'"):
        save({}, values={"loss": value})
    assert list(tmp_path.iterdir()) == []


CUTS = {
    "whole": [((0, 0), (7, 5))],
    "uneven rows": [((0, 0), (3, 5)), ((3, 0), (2, 5)), ((5, 0), (1, 5)), ((6, 0), (1, 5))],
    "2x2": [((0, 0), (4, 3)), ((0, 3), (4, 2)), ((4, 0), (3, 3)), ((4, 3), (3, 2))],
    "a rank without rows": [((0, 0), (7, 2)), ((7, 0), (0, 5)), ((0, 2), (7, 3))],
}


def blocks(full: Tensor, cut: str) -> list[dict[str, TensorState]]:
    shares = []
    for (row, column), (rows, columns) in CUTS[cut]:
        own = full[row : row + rows, column : column + columns].clone()
        shares.append({"w": tensor_state(own, full_shape=full.shape, start=(row, column))})
    return shares


@pytest.mark.parametrize("cut", CUTS)
def test_any_box_can_be_read_from_any_cut(save: Save, cut: str) -> None:
    full = torch.arange(35.0).view(7, 5)
    saved = save(blocks(full, cut))
    assert torch.equal(saved.tensor("w"), full)
    for r0, r1 in itertools.combinations_with_replacement(range(8), 2):
        for c0, c1 in itertools.combinations_with_replacement(range(6), 2):
            assert torch.equal(saved.slice("w", (r0, c0), (r1 - r0, c1 - c0)), full[r0:r1, c0:c1])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(CUTS, CUTS)))
def test_saved_under_one_cut_restored_under_another(save: Save, old: str, new: str) -> None:
    full = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    saved = save(blocks(full, old), layout={"shard": len(CUTS[old])})
    places = blocks(torch.zeros(7, 5), new)
    for place, expected in zip(places, blocks(full, new), strict=True):
        saved.restore(place, layout={"shard": len(CUTS[new])})
        assert torch.equal(place["w"].tensor, expected["w"].tensor)


def test_a_rank_may_hold_several_boxes_of_a_tensor(save: Save) -> None:
    full = torch.arange(24.0).view(8, 3)

    def interleaved(values: Tensor, rank: int) -> TensorState:
        local = torch.cat([values[2 * rank : 2 * rank + 2], values[4 + 2 * rank : 6 + 2 * rank]])
        low = tensor_state(local[:2], full_shape=(8, 3), start=(2 * rank, 0)).blocks[0]
        high = tensor_state(local[2:], full_shape=(8, 3), start=(4 + 2 * rank, 0)).blocks[0]
        return TensorState(local, Kind.PARAMETER, (8, 3), (low, type(high)(high.start, high.shape, (2, 0))))

    saved = save([{"gate_up": interleaved(full, rank)} for rank in range(2)])
    assert torch.equal(saved.tensor("gate_up"), full)
    place = interleaved(torch.zeros(8, 3), 1)
    saved.restore({"gate_up": place}, layout={})
    assert torch.equal(place.tensor, interleaved(full, 1).tensor)


def test_equal_copies_are_written_once_and_by_all_in_turn(save: Save) -> None:
    weights = {f"model/{i}": torch.full((4,), float(i)) for i in range(32)}
    shares = [
        {name: tensor_state(t.clone(), Kind.REPLICATED, holder=(rank, 2)) for name, t in weights.items()}
        for rank in range(2)
    ]
    saved = save(shares)
    by_file = [saved.entry(name).parts[0].file for name in weights]
    assert sorted(set(by_file)) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert 8 <= by_file.count("rank-00000.safetensors") <= 24
    assert needed_bytes(shares[0]) + needed_bytes(shares[1]) == 32 * 16
    for name, tensor in weights.items():
        assert torch.equal(saved.tensor(name), tensor)


def per_replica(rule: Rule, replicas: int, like: Tensor) -> list[dict[str, TensorState]]:
    return [
        {"sync/r": tensor_state(like + r, Kind.PER_REPLICA, rule=rule, place=(r, replicas))} for r in range(replicas)
    ]


@pytest.mark.parametrize("rule", Rule)
def test_per_replica_state_of_as_many_replicas_is_each_ones_own(save: Save, rule: Rule) -> None:
    saved = save(per_replica(rule, 3, torch.arange(4.0)))
    for r, place in enumerate(per_replica(rule, 3, torch.full((4,), -9.0))):
        saved.restore(place, layout={"replicas": 3})
        assert torch.equal(place["sync/r"].tensor[0], torch.arange(4.0) + r)


@pytest.mark.parametrize(
    ("rule", "replicas", "expected"),
    [
        (Rule.MEAN, 2, [1.5, 1.5]),
        (Rule.MEAN, 1, [1.5]),
        (Rule.CLONE, 2, [0, 1]),
        (Rule.CLONE, 6, [0, 1, 2, 3, 0, 1]),
        (Rule.FRESH, 2, [-9, -8]),
    ],
)
def test_per_replica_state_of_another_number_of_replicas_follows_its_rule(
    save: Save, rule: Rule, replicas: int, expected: list[float]
) -> None:
    saved = save(per_replica(rule, 4, torch.zeros(2, 2)))
    for place, value in zip(per_replica(rule, replicas, torch.full((2, 2), -9.0)), expected, strict=True):
        saved.restore(place, layout={"replicas": replicas})
        assert torch.equal(place["sync/r"].tensor[0], torch.full((2, 2), value))


def test_per_replica_state_that_is_cut_inside_its_replica(save: Save) -> None:
    full = torch.arange(12.0).view(6, 2)

    def share(replica: int, replicas: int, start: int, rows: int, values: Tensor) -> dict[str, TensorState]:
        own = values[start : start + rows].clone()
        state = tensor_state(
            own, Kind.PER_REPLICA, rule=Rule.MEAN, place=(replica, replicas), full_shape=(6, 2), start=(start, 0)
        )
        return {"r": state}

    saved = save([share(r, 2, start, 3, full + 10 * r) for r in range(2) for start in (0, 3)])
    assert saved.entry("r").shape == (2, 6, 2)
    place = share(0, 1, 1, 4, torch.zeros(6, 2))
    saved.restore(place, layout={})
    assert torch.equal(place["r"].tensor[0], full[1:5] + 5)


def test_per_replica_state_that_some_replicas_do_not_have_yet(save: Save) -> None:
    """Rules take those that have one; who asks for what it did not save is told so."""
    first, missing, last = per_replica(Rule.MEAN, 3, torch.zeros(4))
    saved = save([first, {}, last])
    assert saved.entry("sync/r").holders == [0, 2]
    for rule, expected in ((Rule.MEAN, [1, 1]), (Rule.CLONE, [0, 2])):
        for place, value in zip(per_replica(rule, 2, torch.full((4,), -9.0)), expected, strict=True):
            saved.restore(place, layout={"replicas": 2})
            assert torch.equal(place["sync/r"].tensor[0], torch.full((4,), float(value)))
    assert torch.equal(saved.common("sync/r"), torch.ones(4))
    saved.restore(last, layout={"replicas": 3})
    with pytest.raises(CheckpointError, match="replica 1 saved no sync/r in step"):
        saved.restore(missing, layout={"replicas": 3})


def test_a_replica_of_which_a_part_is_missing_is_not_saved(save: Save) -> None:
    def half(replica: int, start: int) -> dict[str, TensorState]:
        place, own = (replica, 2), torch.zeros(3, 2)
        return {
            "r": tensor_state(own, Kind.PER_REPLICA, rule=Rule.MEAN, place=place, full_shape=(6, 2), start=(start, 0))
        }

    with pytest.raises(CheckpointError, match="the ranks wrote 18 of its 24 elements"):
        save([half(0, 0), half(0, 3), half(1, 3)])
    with pytest.raises(CheckpointError, match="a part lies outside of its shape"):
        save([half(0, 0), half(0, 3), half(2, 0), half(2, 3)])


def test_opaque_state_loads_under_its_own_layout_only(save: Save) -> None:
    def shares(ranks: int, fill: int) -> list[Mapping[str, TensorState]]:
        return [
            {"random/state": tensor_state(torch.tensor([fill * r, r]), Kind.OPAQUE, place=(r, ranks))}
            for r in range(ranks)
        ]

    saved = save(shares(4, 5), layout={"replicas": 2, "shard": 2})
    place = shares(4, 0)[3]
    saved.restore(place, layout={"replicas": 2, "shard": 2})
    assert place["random/state"].tensor.tolist() == [[15, 3]]
    with pytest.raises(CheckpointError, match="layout it was saved with, replicas=2, shard=2; this run has replicas=4"):
        saved.restore(shares(4, 0)[3], layout={"replicas": 4, "shard": 1})


def test_tied_names_are_one_tensor_in_the_file(save: Save, tmp_path: Path) -> None:
    shared = torch.randn(16, 4)
    saved = save({"model/embed": tensor_state(shared), "model/head": tensor_state(shared)})
    assert saved.entry("model/embed").parts == saved.entry("model/head").parts
    assert list(load_file(tmp_path / "step-00000100" / "rank-00000.safetensors")) == ["model/embed"]
    assert torch.equal(saved.tensor("model/head"), shared)
    place = torch.zeros(16, 4)
    tied = {"model/embed": tensor_state(place), "model/head": tensor_state(place)}
    saved.restore(tied, layout={})
    assert torch.equal(place, shared)


def test_names_tied_here_must_be_equal_in_the_checkpoint(save: Save) -> None:
    saved = save({"model/embed": tensor_state(torch.ones(3)), "model/head": tensor_state(torch.zeros(3))})
    place = torch.zeros(3)
    with pytest.raises(CheckpointError, match="model/head and model/embed are one tensor in this run, but differ"):
        saved.restore({"model/embed": tensor_state(place), "model/head": tensor_state(place)}, layout={})


def test_a_large_share_is_split_over_files(save: Save) -> None:
    tensors = {f"t{i}": torch.randn(100) for i in range(5)}
    saved = save({name: tensor_state(t) for name, t in tensors.items()}, file_bytes=900)
    files = [saved.entry(name).parts[0].file for name in tensors]
    assert files == [f"rank-00000{part}.safetensors" for part in ("", "", "-1", "-1", "-2")]
    for name, tensor in tensors.items():
        assert torch.equal(saved.tensor(name), tensor)
    saved.verify()


def test_restore_writes_into_parameters(save: Save) -> None:
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    saved = save({f"model/{name}": tensor_state(p) for name, p in source.named_parameters()})
    saved.restore({f"model/{name}": tensor_state(p) for name, p in target.named_parameters()}, layout={})
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)
    assert target.weight.requires_grad


def test_names_are_checked_both_ways(save: Save) -> None:
    saved = save({f"model/{name}": tensor_state(torch.zeros(1)) for name in "abc"})
    saved.require(["model/a", "model/b", "model/c"])
    with pytest.raises(CheckpointError) as caught:
        saved.require(["model/a", "model/x", "optimizer/y"])
    assert "does not hold 2 that this run needs (model/x, optimizer/y)" in str(caught.value)
    assert "holds 2 that this run does not know (model/b, model/c)" in str(caught.value)
    place = torch.ones(1)
    with pytest.raises(CheckpointError, match="does not know"):
        saved.restore({"model/a": tensor_state(place)}, layout={})
    assert place.item() == 1


def test_a_part_of_the_state_by_prefix(save: Save) -> None:
    saved = save({"model/a": tensor_state(torch.ones(2)), "optimizer/a/exp_avg": tensor_state(torch.zeros(2))})
    place = torch.zeros(2)
    saved.restore({"model/a": tensor_state(place)}, layout={}, prefix="model/")
    assert torch.equal(place, torch.ones(2))
    with pytest.raises(CheckpointError, match="optimizer/b"):
        saved.restore({"optimizer/b": tensor_state(place)}, layout={}, prefix="optimizer/")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (tensor_state(torch.zeros(2, 3, dtype=torch.bfloat16)), "w was saved in float32 and is bfloat16 here"),
        (tensor_state(torch.zeros(3, 2)), r"w was saved with shape \[2, 3\] and has \[3, 2\] here"),
        (tensor_state(torch.zeros(2, 3), Kind.REPLICATED), "w was saved as parameter and is replicated here"),
        (
            tensor_state(torch.zeros(2, 3), Kind.OPAQUE, place=(0, 2)),
            "w was saved as parameter and is opaque here",
        ),
    ],
)
def test_state_of_another_form_is_refused(save: Save, state: TensorState, message: str) -> None:
    saved = save({"w": tensor_state(torch.ones(2, 3))})
    with pytest.raises(CheckpointError, match=message):
        saved.restore({"w": state}, layout={})
    assert not state.tensor.any()


def test_an_unknown_name_is_said_so(save: Save) -> None:
    with pytest.raises(CheckpointError, match="step 100 holds no model/b; it has 1 tensors: model/a"):
        save({"model/a": tensor_state(torch.zeros(1))}).tensor("model/b")


def test_parts_that_do_not_cover_a_tensor_are_refused(save: Save, tmp_path: Path) -> None:
    half = tensor_state(torch.zeros(2, 3), full_shape=(4, 3), start=(0, 0))
    with pytest.raises(CheckpointError, match="the ranks wrote 6 of its 12 elements"):
        save({"w": half})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["w", "a"])  # of two holders the first writes the one, the second the other
@pytest.mark.parametrize("index", [0, 1])
def test_ranks_that_both_think_they_are_the_same_holder_are_refused(save: Save, index: int, name: str) -> None:
    states = [{name: tensor_state(torch.zeros(2), holder=(index, 2))} for _ in range(2)]
    writes_twice = (index == 0) == (name == "w")
    message = (
        "two parts overlap" if writes_twice else f"{name}: the ranks wrote 0 of its 2|lacks {name}, for its holders"
    )
    with pytest.raises(CheckpointError, match=message):
        save(states)


def test_two_ranks_that_write_the_same_box_are_refused(save: Save) -> None:
    with pytest.raises(CheckpointError, match="w: two parts overlap, so two ranks wrote the same elements"):
        save([{"w": tensor_state(torch.zeros(2))}, {"w": tensor_state(torch.zeros(2))}])


def test_ranks_that_disagree_about_a_tensor_are_refused(save: Save) -> None:
    top = tensor_state(torch.zeros(2, 3), full_shape=(4, 3), start=(0, 0))
    bottom = tensor_state(torch.zeros(2, 3, dtype=torch.float64), full_shape=(4, 3), start=(2, 0))
    with pytest.raises(CheckpointError, match=r"parameter float32 .* on one rank and parameter float64"):
        save([{"w": top}, {"w": bottom}])


def test_a_dtype_that_safetensors_lacks_is_refused(save: Save) -> None:
    with pytest.raises(CheckpointError, match=r"w is of torch\.complex128, which a safetensors file cannot hold"):
        save({"w": tensor_state(torch.zeros(2, dtype=torch.complex128))})


def test_the_manifest_says_what_the_format_promises(save: Save, tmp_path: Path) -> None:
    save({"model/w": tensor_state(torch.zeros(2, 3))}, values={"tokens_seen": 7}, layout={"replicas": 1})
    body = json.loads((tmp_path / "step-00000100" / "manifest.json").read_text())
    part = {"file": "rank-00000.safetensors", "key": "model/w", "start": [0, 0], "shape": [2, 3]}
    assert body["tensors"] == {
        "model/w": {"dtype": "float32", "shape": [2, 3], "kind": "parameter", "rule": None, "parts": [part]}
    }
    assert {key: body[key] for key in ("format", "step", "values", "layout")} == {
        "format": 1,
        "step": 100,
        "values": {"tokens_seen": 7},
        "layout": {"replicas": 1},
    }
    assert set(body) == {
        *("format", "step", "created", "paceline", "torch", "layout", "values", "tensors", "files", "sha256")
    }


def test_the_buffer_is_used_again(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path, rank=0, ranks=1, exchange=LocalExchange(), layout={})
    for step, n in [(1, 1000), (2, 10), (3, 2000), (4, 1000)]:
        tensor = torch.full((n,), float(step))
        writer.save(step, {"t": tensor_state(tensor)}, {})
        (saved,) = writer.wait()
        assert (saved.step, saved.rank_bytes, saved.path) == (step, 4 * n, tmp_path / f"step-{step:08d}")
        with load(tmp_path, step) as checkpoint:
            checkpoint.verify()
            assert torch.equal(checkpoint.tensor("t"), tensor)
