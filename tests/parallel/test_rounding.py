"""Stochastic rounding against its definition, written with NumPy's integers."""

import numpy as np
import pytest
import torch

from paceline.parallel import rounding
from paceline.parallel.rounding import round_box


def rounded(exact, key=1, start=None, full_shape=None):
    kept = torch.zeros(exact.shape, dtype=torch.bfloat16)
    start = (0,) * exact.ndim if start is None else start
    round_box(exact, kept, start=start, full_shape=full_shape or exact.shape, key=key)
    return kept


def neighbours(exact):
    """The bf16 numbers at or next to each value, toward zero and away from it, and the chance of the second."""
    bits = exact.numpy().view(np.uint32)
    inner, share = bits & 0xFFFF0000, bits & 0xFFFF
    outer = inner + np.where(share > 0, 0x10000, 0).astype(np.uint32)
    return torch.from_numpy(inner.view(np.float32)), torch.from_numpy(outer.view(np.float32)), share / 2**16


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-20, 20, shape, generator=generator)


def test_a_value_becomes_one_of_its_neighbours():
    exact = values(300, 70)
    got, (inner, outer, _) = rounded(exact).float(), neighbours(exact)
    assert ((got == inner) | (got == outer)).all()
    assert 0.45 < (got == outer).float().mean() < 0.55


def test_what_bf16_can_say_stays():
    odd = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf"), 2.0**-133, 3.3895e38])
    for key in range(20):
        assert torch.equal(rounded(odd.bfloat16().float(), key), odd.bfloat16())
        assert rounded(torch.tensor([float("nan")]), key).isnan().all()


@pytest.mark.parametrize("share", [0, 1, 655, 13107, 32768, 65535])
def test_the_mean_is_the_value(share):
    """So many of 65,536 parts on the way from 1 to the next bf16 number, and the same from -1; 5 standard errors."""
    count = 1 << 18
    for sign in (0, 1):
        bits = np.full(count, (sign << 31) | 0x3F800000 | share, np.uint32)
        exact = torch.from_numpy(bits.view(np.float32)).view(512, -1)
        up = rounded(exact, key=share).float().abs() > 1.0
        chance = share / 2**16
        assert abs(up.double().mean() - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5


def test_an_update_too_small_for_bf16_is_not_lost():
    """512 updates of 2^-9, each of which is nothing to the nearest, come to 1, up to 5 errors of a random walk."""
    weights = torch.ones(1000, dtype=torch.bfloat16)
    assert torch.equal((weights.float() + 2.0**-9).bfloat16(), weights)
    for step in range(512):
        weights = rounded(weights.float() + 2.0**-9, key=step)
    deviation = float((weights.float() - 2.0).std())
    assert 0 < deviation < 0.2
    assert abs(float(weights.float().mean()) - 2.0) <= 5 * deviation / 1000**0.5


def test_draws_of_neighbours_keys_and_steps_do_not_hang_together():
    half = torch.full((512, 512), 1.0 + 2.0**-8)  # half way
    up = torch.stack([(rounded(half, key) > 1.0).double() - 0.5 for key in (1, 2)]) * 2
    pairs = [
        (up[0], up[1]),
        (up[0, :, 1:], up[0, :, :-1]),
        (up[0, 1:], up[0, :-1]),
        (up[0, 1:, :-1], up[0, :-1, 1:]),
    ]
    for one, other in pairs:
        assert abs((one * other).mean()) <= 5 / one.numel() ** 0.5


@pytest.mark.parametrize("shape", [(40,), (12, 10), (6, 5, 8), (3, 4, 2, 6)])
def test_a_box_is_rounded_as_in_the_whole(shape, monkeypatch):
    monkeypatch.setattr(rounding, "ELEMENTS", 16)  # several parts
    exact = values(*shape)
    whole = rounded(exact, key=7)
    start = tuple(size // 3 for size in shape)
    box = tuple(slice(at, size - 1) for at, size in zip(start, shape, strict=True))
    assert torch.equal(rounded(exact[box], key=7, start=start, full_shape=shape), whole[box])
    assert not torch.equal(rounded(exact[box], key=7, full_shape=shape), whole[box])


def test_a_scalar_and_what_is_far_behind():
    assert rounded(torch.tensor(1.0 + 2.0**-9)).float().item() in (1.0, 1.0 + 2.0**-7)
    half = torch.full((1, 4096), 1.0 + 2.0**-8)
    shape = (2**34, 2**33)
    far = [rounded(half, start=(row, column), full_shape=shape) for row in (5, 2**32 + 5) for column in (7, 2**32 + 7)]
    assert len({tuple(box.flatten().tolist()) for box in far}) == 4, "numbers of more than 32 bits count in full"


def test_empty_boxes():
    assert rounded(torch.empty(0, 4)).shape == (0, 4) and rounded(torch.empty(3, 0)).shape == (3, 0)
