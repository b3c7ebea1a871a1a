"""What holds for every reducer, read from the table, and what each is, against its definition in fp64."""

import numpy as np
import pytest
import torch

from paceline.config import choose
from paceline.registry import REDUCERS
from reducers import CODES, SHAPES, coded_sums, exchange, powersgd_sums, random_inputs, topk_sums
from tolerances import FP64_EQUAL

EVERY = pytest.mark.parametrize("name", list(REDUCERS))
LOSSY = [name for name in REDUCERS if not REDUCERS.load(name).is_exact]
MEMBERS = pytest.mark.parametrize("members", [2, 3])


def lossless(name):
    """A reducer all of whose error is fed back."""
    return {"name": name, "error_feedback": True} | ({"decay": 1.0} if name == "dct_topk" else {})


def close(one, other):
    """Of one tensor, relative to its norm."""
    one, other = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    return float((one - other).norm()) <= FP64_EQUAL * max(1e-300, float(other.norm()))


@EVERY
@MEMBERS
def test_all_get_the_same_bits_and_send_the_bytes_announced(name, members, pool):
    inputs = random_inputs(2, members)
    told = pool.run(exchange, members, name, inputs, None, (), torch.float32)
    for own in told:
        assert own["sent_bytes"] == 2 * choose(REDUCERS, name).wire_bytes(SHAPES, members) > 0
        for one, first in zip(own["sums"], told[0]["sums"], strict=True):
            assert all(torch.equal(one[key], first[key]) and one[key].shape == SHAPES[key] for key in SHAPES)


@pytest.mark.parametrize("name", LOSSY)
@MEMBERS
def test_what_is_put_in_comes_out_or_is_left_over(name, members, pool):
    """Over several rounds, shares that differ, and sums that are not used; nothing is lost and nothing counts twice."""
    inputs, shares = random_inputs(3, members, seed=1), [0.5, 0.2, 0.3][:members]
    told = pool.run(exchange, members, lossless(name), inputs, shares, ("vector",))
    for key in SHAPES:
        put_in = sum(share * values[i][key] for values in inputs for i, share in enumerate(shares))
        came_out = sum(sums[key] for sums in told[0]["sums"])
        left = sum(own["left"][key] for own in told)
        if key == "vector":  # always taken back
            assert not left.any()
        else:
            assert close(came_out + left, put_in), key


@pytest.mark.parametrize("name", LOSSY)
def test_tensors_of_any_size_are_summed_once(name, pool):
    """Also where there are fewer blocks than members, some of which then own nothing."""
    rng = np.random.default_rng(12)
    for members in (2, 3, 3):
        shapes = {
            f"t{i}": tuple(int(n) for n in rng.integers(1, 40, rng.integers(0, 4))) for i in range(rng.integers(1, 4))
        }
        inputs = random_inputs(2, members, shapes, seed=members)
        told = pool.run(exchange, members, lossless(name), inputs)
        for key in shapes:
            put_in = sum(own[key] for values in inputs for own in values)
            left = sum(own["left"][key] for own in told)
            assert close(sum(sums[key] for sums in told[0]["sums"]) + left, put_in), (shapes, key)


@pytest.mark.parametrize("name", list(CODES))
@MEMBERS
def test_encodings_of_every_value_are_what_they_are_defined_to_be(name, members, pool):
    inputs, shares = random_inputs(3, members, seed=2), [0.5, 0.2, 0.3][:members]
    expected, left = coded_sums(CODES[name], inputs, shares)
    reducer = {"name": name} if name in REDUCERS else {"name": "int4", "format": name}
    told = pool.run(exchange, members, {**reducer, "error_feedback": True}, inputs, shares)
    for one, other in zip(told[0]["sums"], expected, strict=True):
        assert all(close(one[key], other[key]) for key in SHAPES)
    for own, kept in zip(told, left, strict=True):
        assert all(np.allclose(own["left"][key], kept[key], rtol=0, atol=1e-12) for key in SHAPES)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_without_error_feedback_rounding_is_by_chance_and_right_on_average(name, pool):
    """The same values in every round, differently rounded by each member and each time."""
    rounds, members = 100, 2
    inputs = random_inputs(1, members, {"w": (20, 40)}, seed=4) * rounds
    told = pool.run(exchange, members, {"name": name, "error_feedback": False}, inputs)
    sums = torch.stack([one["w"] for one in told[0]["sums"]])
    assert told[0]["state"] == {}
    exact = torch.as_tensor(inputs[0][0]["w"] + inputs[0][1]["w"])
    spread = sums.std(0)
    assert (spread > 0).float().mean() > 0.9
    apart = (sums.mean(0) - exact).abs() / (spread / rounds**0.5).clamp_min(1e-12)
    assert apart[spread > 0].square().mean() < 1.3  # 1 if the mean is exact


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_member_is_so_in_the_sum_and_leaves_nothing(name, bad, pool):
    inputs = random_inputs(2, 2, seed=5)
    good = pool.run(exchange, 2, name, inputs[:1])
    inputs[1][1]["matrix"][3, 4] = bad
    told = pool.run(exchange, 2, name, inputs)
    assert not told[0]["sums"][1]["matrix"].isfinite().all()
    kept = pool.run(exchange, 2, name, inputs[1:], None, tuple(SHAPES))
    for own in kept:
        assert all(not tensor.any() for tensor in own["left"].values())
    assert all(tensor.isfinite().all() for own in good for tensor in own["left"].values())


def agree(told, expected, left):
    for one, other in zip(told[0]["sums"], expected, strict=True):
        assert all(close(one[key], other[key]) for key in other)
    for own, kept in zip(told, left, strict=True):
        assert all(np.allclose(own["left"][key], kept[key], rtol=0, atol=1e-10) for key in kept)


WIDE = {"long": (3, 5000), "few": (7,)}


def test_topk_takes_the_first_of_the_greatest(pool):
    inputs, shares = random_inputs(3, 3, WIDE, seed=6), [0.5, 0.2, 0.3]
    inputs[0][0]["long"] = np.sign(inputs[0][0]["long"])  # all of one size
    told = pool.run(exchange, 3, {"name": "topk", "share": 0.1}, inputs, shares)
    agree(told, *topk_sums(0.1, inputs, shares))


@pytest.mark.parametrize("name", ["topk", "randomk"])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_all_of_the_values_are_the_mean(name, error_feedback, pool):
    inputs, shares = random_inputs(2, 3, WIDE, seed=7), [0.5, 0.2, 0.3]
    told = pool.run(exchange, 3, {"name": name, "share": 1.0, "error_feedback": error_feedback}, inputs, shares)
    mean = pool.run(exchange, 3, "mean", inputs, shares)
    for one, other in zip(told[0]["sums"], mean[0]["sums"], strict=True):
        assert all(close(one[key], other[key]) for key in WIDE)
    assert all(not tensor.any() for own in told for tensor in own["left"].values())


def test_randomk_takes_other_places_each_time_and_is_right_on_average(pool):
    rounds = 200
    inputs = random_inputs(1, 2, {"w": (20, 40)}, seed=8) * rounds
    told = pool.run(exchange, 2, {"name": "randomk", "share": 0.25, "error_feedback": False}, inputs)
    sums = torch.stack([one["w"] for one in told[0]["sums"]])
    exact = torch.as_tensor(inputs[0][0]["w"] + inputs[0][1]["w"])
    is_sent = (sums != 0) & (exact != 0)
    assert torch.allclose(sums[is_sent], (4 * exact).expand_as(sums)[is_sent])
    taken = is_sent.double().mean(0)[exact != 0]
    assert abs(taken.mean() - 0.25) < 0.01 and (taken - 0.25).abs().max() < 0.15


def test_powersgd_is_power_iteration_with_the_factor_of_before(pool):
    shapes = {"matrix": (24, 33), "experts": (2, 5, 30), "vector": (50,), "small": (2, 3)}
    inputs, shares = random_inputs(4, 3, shapes, seed=9), [0.5, 0.2, 0.3]
    told = pool.run(exchange, 3, {"name": "powersgd", "rank": 2}, inputs, shares)
    flat = [[{k: v.reshape(-1, v.shape[-1]) if v.ndim > 1 else v for k, v in own.items()} for own in r] for r in inputs]
    begun = pool.run(exchange, 2, {"name": "powersgd", "rank": 2}, inputs[:1], None, tuple(shapes))[0]["state"]
    first = {key.removesuffix("/right_factor"): q.numpy() for key, q in begun.items() if key.endswith("right_factor")}
    assert set(first) == {"matrix", "experts"}
    expected, left = powersgd_sums(2, first, flat, shares)
    shaped = lambda tree: {key: value.reshape(shapes[key]) for key, value in tree.items()}  # noqa: E731
    agree(told, [shaped(one) for one in expected], [shaped(one) for one in left])


def test_powersgd_finds_a_matrix_of_low_rank_and_begins_anew_after_zeros(pool):
    rng = np.random.default_rng(10)
    low = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 30))
    inputs = [[{"m": np.zeros((20, 30))}] * 2, [{"m": low}, {"m": 3 * low}], [{"m": low}, {"m": low}]]
    told = pool.run(exchange, 2, {"name": "powersgd", "rank": 2, "error_feedback": False}, inputs)
    for one, factor in zip(told[0]["sums"], (0, 4, 2), strict=True):
        assert torch.allclose(one["m"], torch.as_tensor(factor * low))


def cosines(size):
    """The orthonormal cosine transform, by SciPy's definition, row by row."""
    basis = np.array([[np.cos(np.pi * k * (2 * n + 1) / (2 * size)) for n in range(size)] for k in range(size)])
    return basis * np.sqrt(np.where(np.arange(size) == 0, 1, 2) / size)[:, None]


def test_dct_topk_sends_the_greatest_coefficients_of_tiles(pool):
    """By DeMo's rule: a residual that decays, tiles of the greatest divisors up to 64."""
    shapes, tiles = {"m": (130, 48), "v": (96,)}, {"m": (26, 48), "v": (1, 48)}
    inputs, decay, number = random_inputs(3, 2, shapes, seed=11), 0.9, 5
    told = pool.run(exchange, 2, {"name": "dct_topk", "number": number, "decay": decay}, inputs)
    left = [{name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2)]
    for round_, values in enumerate(inputs):
        for name, (height, width) in tiles.items():
            total = np.zeros(shapes[name])
            for own, kept in zip(values, left, strict=True):
                matrix = np.atleast_2d(own[name] + decay * kept[name])
                sent = np.zeros_like(matrix)
                for i in range(0, matrix.shape[0], height):
                    for j in range(0, matrix.shape[1], width):
                        window = (slice(i, i + height), slice(j, j + width))
                        coefficients = cosines(height) @ matrix[window] @ cosines(width).T
                        least = np.sort(np.abs(coefficients).ravel())[-number]
                        coefficients[np.abs(coefficients) < least] = 0
                        sent[window] = cosines(height).T @ coefficients @ cosines(width)
                kept[name] = (matrix - sent).reshape(shapes[name])
                total += sent.reshape(shapes[name])
            assert close(told[0]["sums"][round_][name], total)
