"""Chance that follows from numbers: it is as often as asked for, and of no number can it be told from another."""

import itertools

import pytest
import torch

from paceline.models.chance import fold, stream_seed, taken

STEPS, SEQUENCES, POSITIONS, FEATURES = 6, 8, 48, 96
SURE = 5.0
"""Standard deviations."""


def sample(probability, place="layer"):
    """(steps, sequences, positions, features), as a dropout asks for them."""
    sequences, positions, features = (torch.arange(n) for n in (SEQUENCES, POSITIONS, FEATURES))
    steps = [fold(stream_seed(7, step, place), sequences) for step in range(STEPS)]
    return torch.stack([taken(fold(key.unsqueeze(-1), positions), features, probability) for key in steps])


def test_fold_is_splitmix64():
    """Its first outputs from the seed 1234567, as published with the reference implementation."""
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert fold(1234567, torch.arange(1, 6)).tolist() == [n - (1 << 64) if n >= 1 << 63 else n for n in numbers]


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_taken_as_asked_for(probability):
    drawn = sample(probability).double()
    variance = probability * (1 - probability)
    assert abs(drawn.mean() - probability) < SURE * (variance / drawn.numel()) ** 0.5
    for dim in range(4):  # in every step, in every sequence, at every position, of every feature
        others = [other for other in range(4) if other != dim]
        count = drawn.numel() / drawn.shape[dim]
        assert (drawn.mean(others) - probability).abs().max() < SURE * (variance / count) ** 0.5


def test_nothing_and_everything():
    assert not sample(0.0).any() and sample(1.0).all()


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_neighbours_are_independent(probability):
    drawn = sample(probability).double() - probability
    other_place = sample(probability, "another layer").double() - probability
    variance = probability * (1 - probability)

    def correlation(a, b):
        return float((a * b).mean() / variance * a.numel() ** 0.5)

    assert abs(correlation(drawn, other_place)) < SURE
    for distances in itertools.product((0, 1, 2), repeat=4):
        if any(distances):
            ends = zip(drawn.shape, distances, strict=True)
            first = drawn[tuple(slice(0, size - distance) for size, distance in ends)]
            second = drawn[tuple(slice(distance, None) for distance in distances)]
            assert abs(correlation(first, second)) < SURE, distances
            assert abs(correlation(first, second.flip(-1))) < SURE, distances


def test_rows_are_as_different_as_chance_makes_them():
    """No row is another one moved along: overlapping stretches of one stream would be."""
    rows = sample(0.5).flatten(0, 2).double() - 0.5
    spectrum = torch.fft.rfft(rows, 2 * FEATURES)
    for step in (1, 7, 100):
        moved = torch.fft.irfft(spectrum[step:] * spectrum[:-step].conj(), 2 * FEATURES).abs()
        assert moved.max() < 0.25 * 60  # of at most 96 x 0.25
