"""Clipping and noise against their definitions, over layouts and replicas; what is refused. The account of it:
test_privacy_account.py."""

import math

import numpy as np
import pytest
import torch

from federation import Federation, federated, plus, square, times
from loops import distance, run_all
from paceline.comm.boxes import Part, block
from paceline.comm.replica import Shard
from paceline.errors import ConfigError, MissingExtraError, PlanError
from paceline.plan.run import plan_run
from paceline.sync.normal import add_normal
from paceline.sync.privacy import AdaptiveClip, PrivacyOptions
from paceline.train.clients import check_extras, privacy_words
from paceline.verify.double import in_double
from tolerances import FP64_EQUAL


def normal(name, shape, deviation=1.0, key=(3, "privacy", 1)):
    tensor = torch.zeros(shape, dtype=torch.float64)
    add_normal(tensor, Shard(name, torch.nn.Parameter(torch.zeros(shape))), deviation, key)
    return tensor


def test_the_noise_is_normal_and_follows_from_the_key():
    noise = normal("w", (400, 500), 2.0)
    x = np.sort(noise.flatten().numpy() / 2.0)
    expected = 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2))).numpy()
    distance_ks = np.abs(expected - (np.arange(len(x)) + 0.5) / len(x)).max()
    assert distance_ks < 1.63 / math.sqrt(len(x))  # Kolmogorov-Smirnov at 1 %
    assert abs(float(np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1])) < 0.01
    assert torch.equal(noise, normal("w", (400, 500), 2.0))
    for other in (normal("v", (400, 500), 2.0), normal("w", (400, 500), 2.0, (3, "privacy", 2))):
        assert abs(float((noise * other).mean())) < 0.04


def test_a_part_has_the_noise_of_its_place():
    whole = normal("w", (8, 6))
    part = torch.zeros(3, 6, dtype=torch.float64)
    shard = Shard("w", torch.nn.Parameter(torch.zeros(3, 6)), Part((8, 6), (block((3, 6), (2, 0)),)))
    add_normal(part, shard, 1.0, (3, "privacy", 1))
    assert torch.equal(part, whole[2:5])


PRIVATE = {"weights": "uniform", "privacy": {"clip": 0.02, "noise": 0.5}}
ADAPTIVE = {"weights": "uniform", "privacy": {"clip": 0.05, "noise": 0.2, "adaptive": {"rate": 1.0}}}


def by_definition(run):
    """Two rounds: clip each, mean over the fixed number of clients, noise of N(0, (z clip / m)^2), the next clip."""
    told = run.sync.privacy
    m, clip, clips = run.sync.clients_per_round, told.clip, [told.clip]
    sigma_b = m / 20
    z = (told.noise**-2 - (2 * sigma_b) ** -2) ** -0.5 if told.adaptive else told.noise

    def server(number, now, updates):
        nonlocal clip
        total, within = times(now, 0.0), 0
        for _, update, _, _ in updates:
            length = math.sqrt(square(update))
            total, within = plus(total, update, min(1.0, clip / length)), within + (length <= clip)
        after = {}
        for name, value in now.items():
            noise = normal(name, value.shape, 1.0, (run.seed, "privacy", number))
            after[name] = value + (total[name] + z * clip * noise) / m
        if told.adaptive:
            noisy = (within + sigma_b * float(normal("count", (), 1.0, (run.seed, "privacy", number)))) / m
            clip = clip * math.exp(-told.adaptive.rate * (noisy - 0.5))
            clips.append(clip)
        return after

    with in_double():
        losses, weights = Federation(run).learn(server)
    return losses, weights, clips


@pytest.mark.parametrize(("replicas", "layout"), [(1, {}), (2, {}), (1, {"tensor": 2}), (1, {"shard": 2})])
def test_weights_are_those_of_the_definition(replicas, layout, pool, tmp_path):
    runs = [
        federated(folder=str(tmp_path / str(i)), replicas=replicas, layout=layout, **options)
        for i, options in enumerate((PRIVATE, ADAPTIVE))
    ]
    for options, ran in zip((PRIVATE, ADAPTIVE), run_all(pool, runs), strict=True):
        losses, weights, clips = by_definition(federated(**options))
        assert ran.losses[-1] == pytest.approx(losses, rel=FP64_EQUAL)
        for own in ran.weights:
            assert distance(weights, {name: own[name] for name in weights}) <= FP64_EQUAL
        assert float(ran.states[0]["sync/privacy_clip"]) == pytest.approx(clips[-1], rel=FP64_EQUAL)
    assert len(set(clips)) == 3


def test_a_private_run_goes_on_as_if_never_stopped(pool, tmp_path):
    options = ADAPTIVE | {"train": {"steps": 3}}
    (whole,) = run_all(pool, [federated(folder=str(tmp_path / "whole"), **options)])
    run_all(pool, [federated(folder=str(tmp_path / "cut"), **options)], until=1)
    (after,) = run_all(pool, [federated(folder=str(tmp_path / "cut"), **options)])
    assert distance(whole.states[0], after.states[0]) == 0.0
    with pytest.raises(Exception, match="that is another run"):
        run_all(pool, [federated(folder=str(tmp_path / "cut"), **{**options, **PRIVATE})])


def test_the_count_and_the_updates_share_the_noise():
    """Together they cost what the multiplier alone would: z^-2 = z_Delta^-2 + (2 sigma_b)^-2."""
    options = PrivacyOptions(clip=1.0, noise=1.0, adaptive=AdaptiveClip())
    assert options.count_noise(100) == 5.0
    z = options.update_noise(100)
    assert z > 1.0 and z**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0, rel=1e-12)
    assert PrivacyOptions(clip=1.0, noise=1.0).update_noise(100) == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "data"}, "needs weights=uniform, not data"),
        ({"over_selection": 0.3, "speed_spread": 1.0}, "not with privacy"),
        ({"deadline": 3.0, "speed_spread": 1.0}, "not with privacy"),
        ({"buffer": {"updates": 2}, "speed_spread": 1.0}, "not with privacy"),
        ({"scaffold": True}, "not with privacy"),
        ({"q": 1.0}, "not with privacy"),
        ({"aggregate": "median"}, "no bounded sum"),
        ({"privacy": {"clip": 1.0, "noise": 1.0, "adaptive": {}}}, "below twice the noise on the count, 0.3"),
        ({"privacy": {"clip": 1.0, "noise": 1.0, "delta": 1.0}}, "promises nothing"),
    ],
)
def test_what_the_account_would_not_cover_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        federated(**{**PRIVATE, **options})


def test_what_it_cost_is_told_for_the_rounds_and_clients_of_the_run(monkeypatch):
    asked = {}
    monkeypatch.setattr("paceline.train.clients.epsilon", lambda options, **numbers: asked.update(numbers) or 1.25)
    words = privacy_words(federated(**PRIVATE), 40, 7)
    assert words.startswith("epsilon 1.25 at delta 1e-05 after 7 rounds of 3 of 40 clients")
    assert asked == {"rounds": 7, "cohort": 3, "clients": 40}
    assert privacy_words(federated(), 40, 7) is None


def test_early_stopping_and_a_missing_account_are_refused(monkeypatch):
    tree = federated(**PRIVATE).tree()
    run = type(federated()).parse(tree | {"early_stop": {}, "evaluate": {"every": 1}})
    with pytest.raises(PlanError, match="counts the rounds"):
        plan_run(run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[privacy\]'"):
        check_extras(federated(**PRIVATE))
    check_extras(federated())
