"""What privacy costs, by dp-accounting (the extra ``privacy``)."""

import importlib.util
import math

import pytest

from paceline.sync.privacy import PrivacyOptions, epsilon

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="needs the extra: pip install 'paceline[privacy]'"
)


def spent(noise, rounds, cohort, clients, delta=1e-5):
    return epsilon(PrivacyOptions(clip=1.0, noise=noise, delta=delta), rounds=rounds, cohort=cohort, clients=clients)


def gaussian(noise, rounds, delta):
    """Upper bound by Renyi divergence of orders up to 200, with the plain conversion (Mironov 2017, proposition 3)."""
    return min(
        a * rounds / (2 * noise**2) + math.log(1 / delta) / (a - 1) for a in (1 + x / 10 for x in range(1, 2000))
    )


def test_all_clients_in_every_round_is_the_gaussian_mechanism_of_half_the_noise():
    for noise, rounds in ((10.0, 1), (20.0, 100)):
        assert (
            0.5 * gaussian(noise / 2, rounds, 1e-5) < spent(noise, rounds, 50, 50) <= gaussian(noise / 2, rounds, 1e-5)
        )


def test_smaller_cohorts_more_noise_and_fewer_rounds_cost_less():
    base = spent(4.0, 100, 50, 1000)
    assert spent(4.0, 100, 20, 1000) < base < spent(4.0, 100, 100, 1000)
    assert spent(8.0, 100, 50, 1000) < base < spent(2.0, 100, 50, 1000)
    assert spent(4.0, 10, 50, 1000) < base < spent(4.0, 1000, 50, 1000)
    assert spent(4.0, 0, 50, 1000) == 0.0


def test_a_fixed_cohort_is_not_accounted_as_poisson():
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    poisson = RdpAccountant()
    poisson.compose(dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(4.0)), 100)
    assert spent(4.0, 100, 50, 1000) > 1.5 * poisson.get_epsilon(1e-5)
