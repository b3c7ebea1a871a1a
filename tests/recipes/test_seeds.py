"""A config over several seeds: what is trained, what is told, and the interval."""

import math
import statistics

import numpy as np
import pytest

from commands import metrics, paceline, tiny_config, write_texts
from paceline.recipes.seeds import T_975, spread, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, len(T_975) + 1), 31, 100, 1000])
def test_the_quantile_is_where_the_density_leaves_a_fortieth(freedom):
    """Student's density, integrated from 0 to the quantile."""
    at = np.linspace(0, t_quantile(freedom), 20001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(at**2 / freedom))
    assert np.trapezoid(density, at) == pytest.approx(0.475, abs=1e-5)


def test_the_interval_of_a_mean():
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation) == (2.0, 1.0)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3))


def test_each_seed_is_trained_once_in_a_folder_of_its_own(tmp_path):
    write_texts(tmp_path)
    config = str(tiny_config(tmp_path))
    first = paceline(tmp_path, "seeds", config, "--seeds", "3,5", "--json")
    assert first.status == 0, first
    found = first.json()
    losses = [metrics(tmp_path / "run" / f"seed-{seed}")[-1]["loss"] for seed in (3, 5)]
    assert [row["loss"] for row in found["seeds"]] == losses and losses[0] != losses[1]
    assert found["loss"]["mean"] == pytest.approx(statistics.fmean(losses))
    assert found["held_out_loss"]["half_width"] > 0 and found["bits_per_byte"]["deviation"] > 0
    trained = (tmp_path / "run" / "seed-3" / "events.jsonl").read_bytes()
    again = paceline(tmp_path, "seeds", config, "--seeds", "3,5,4", "--json")
    assert again.json()["seeds"][:2] == found["seeds"] and again.out.count("trained already") == 2
    assert (tmp_path / "run" / "seed-3" / "events.jsonl").read_bytes() == trained
    other = paceline(tmp_path, "seeds", config, "optimizer.lr=0.5", "--seeds", "3,5")
    assert other.status and "a finished run of another config" in other.err and len(other.err.splitlines()) == 1


@pytest.mark.parametrize("given", ["1", "1,1", "1,x", "-1,2"])
def test_what_is_no_list_of_seeds_is_refused(tmp_path, given):
    ended = paceline(tmp_path, "seeds", str(tiny_config(tmp_path)), f"--seeds={given}")
    assert ended.status and ended.err.startswith("ConfigError: --seeds=") and len(ended.err.splitlines()) == 1
