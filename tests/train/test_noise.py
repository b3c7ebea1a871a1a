"""The gradient-noise scale, where gradient and noise are known."""

import math

import numpy as np
import pytest

from paceline.train.noise import Norms, estimate

GRADIENT = np.linspace(-1, 2, 20)
DEVIATION = np.linspace(0.5, 3, 20)
SCALE = float((DEVIATION**2).sum() / (GRADIENT**2).sum())


def gradients(rng, batches, sequences):
    """Means of ``sequences`` gradients, each with its own noise."""
    noise = rng.normal(size=(batches, 20)) * DEVIATION / math.sqrt(sequences)
    return GRADIENT + noise


def norms(made, sequences):
    mean = made.mean(0)
    return Norms(sequences=sequences, squares=(made**2).sum(1).tolist(), along=(made @ mean).tolist())


def test_both_estimates_are_unbiased():
    rng = np.random.default_rng(0)
    found = [estimate(norms(gradients(rng, 4, 8), 8)) for _ in range(4000)]
    for values, truth in (
        ([one.gradient_square for one in found], (GRADIENT**2).sum()),
        ([one.trace for one in found], (DEVIATION**2).sum()),
    ):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 4 * error and error < 0.02 * truth


def test_the_scale_is_found_within_its_error():
    rng = np.random.default_rng(1)
    found = [estimate(norms(gradients(rng, 16, 8), 8)) for _ in range(500)]
    scales, errors = np.array([one.scale for one in found]), np.array([one.error for one in found])
    assert np.mean(scales) == pytest.approx(SCALE, rel=0.05)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(scales), rel=0.2), "as far as estimates lie apart"
    assert 0.9 < np.mean(np.abs(scales - SCALE) < 2 * errors) < 0.99


def test_the_jackknife_leaves_out_one_batch_at_a_time():
    made = gradients(np.random.default_rng(2), 5, 8)
    rest = [estimate(norms(np.delete(made, i, 0), 8)).scale for i in range(5)]
    expected = math.sqrt(4 / 5 * sum((scale - sum(rest) / 5) ** 2 for scale in rest))
    assert estimate(norms(made, 8)).error == pytest.approx(expected, rel=1e-9)


def test_the_size_of_a_batch_does_not_matter():
    rng = np.random.default_rng(3)
    for sequences in (1, 64):
        many = estimate(norms(gradients(rng, 5000, sequences), sequences))
        assert many.scale == pytest.approx(SCALE, abs=4 * many.error) and many.error < 0.1 * SCALE


def test_a_gradient_that_is_only_noise_has_no_scale():
    made = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = estimate(norms(made, 8))
    assert found.gradient_square < 0 and found.scale == math.inf and found.error == math.inf
