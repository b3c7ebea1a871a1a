"""Files written tensor by tensor are those that the safetensors library reads and writes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paceline.export.stream import DTYPES, write_sharded


def tensors():
    generator = torch.Generator().manual_seed(1)
    values = {str(dtype): (torch.rand(3, 5, generator=generator) * 100).to(dtype) for dtype in DTYPES}
    return {
        **values,
        "transposed": torch.rand(4, 6, generator=generator).t(),
        "one": torch.tensor(2.5),
        "none": torch.ones(0, 3),
    }


def shapes(values):
    return {name: value.to("meta") for name, value in values.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_every_dtype_and_shape_comes_back(tmp_path):
    values = tensors()
    files = write_sharded(tmp_path, shapes(values), values.items(), 10**9)
    assert files == [tmp_path / "model.safetensors"]
    assert equal(load_file(files[0]), values)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_is_as_large_as_the_library_would_write_it(tmp_path):
    values = {"a": torch.rand(7, 3), "b": torch.rand(5)}
    write_sharded(tmp_path, shapes(values), values.items(), 10**9)
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_shards_hold_at_most_what_was_asked_and_the_index_finds_all(tmp_path):
    values = {f"t{k}": torch.full((10,), float(k)) for k in range(7)}  # 40 bytes each
    values["large"] = torch.zeros(100)
    files = write_sharded(tmp_path, shapes(values), values.items(), 100)
    assert [file.name for file in files] == [f"model-{k:05}-of-00005.safetensors" for k in range(1, 6)]
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40 + 400
    read = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert equal(read, values)


@pytest.mark.parametrize("wrong", [{"b": torch.ones(2)}, {"a": torch.ones(3)}, {"a": torch.ones(2).double()}])
def test_values_that_are_not_as_announced_are_a_programming_error(tmp_path, wrong):
    with pytest.raises(AssertionError):
        write_sharded(tmp_path, {"a": torch.ones(2, device="meta")}, wrong.items(), 100)
