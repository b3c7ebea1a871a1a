"""Which weights stand for replicas that differ."""

import pytest

from loops import config, distance, loop_of, run_all, world_of
from paceline.errors import WorkerError

EACH = {"evaluate": {"every": 1}}


def test_between_exchanges_what_was_agreed_on_last_is_measured(pool, tmp_path):
    """DiLoCo keeps it: the held-out loss changes with an exchange only, and measuring changes nothing."""
    sync = {"name": "diloco", "every": 2}
    losses = []
    for step in (1, 2, 3, 4):
        (ran,) = run_all(
            pool, [config(sync, folder=str(tmp_path / "a"), replicas=2, train={"steps": 5}, **EACH)], until=step
        )
        assert len(set(ran.evaluations)) == 1
        losses.append(ran.evaluations[0])
    assert losses[1] == losses[2] and len(set(losses)) == 3
    (quiet,) = run_all(pool, [config(sync, folder=str(tmp_path / "b"), replicas=2, train={"steps": 5})], until=4)
    assert distance(quiet.weights[1], ran.weights[1]) == 0.0


def test_where_nothing_is_kept_the_mean_is_measured(pool, tmp_path):
    """Local SGD after one step alone is all-reduce SGD, so the mean is what that has."""
    runs = [
        config(sync, folder=str(tmp_path / name), replicas=2, train={"steps": 5}, **EACH)
        for name, sync in {"mean": {"name": "local_sgd", "every": 3}, "whole": "all_reduce"}.items()
    ]
    mean, whole = run_all(pool, runs, until=1)
    assert mean.evaluations == pytest.approx(whole.evaluations, rel=1e-12)
    assert distance(mean.weights[0], whole.weights[0]) > 1e-4 < distance(mean.weights[0], mean.weights[1])


def weights_between(member, run):
    with world_of(member, run) as world, loop_of(run, world) as loop:
        next(iter(loop.steps()))
        loop.weights()


def test_weights_are_not_given_away_where_replicas_differ(pool, tmp_path):
    run = config("diloco", folder=str(tmp_path), replicas=2)
    with pytest.raises(WorkerError, match="after step 1 replicas hold different weights"):
        pool.run(weights_between, 2, run)
