"""Every schedule against torch's, or against its formula in NumPy; and what holds for all, read from the table."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

from paceline import registry
from paceline.config import choose
from paceline.errors import ConfigError

EVERY = pytest.mark.parametrize("name", list(registry.SCHEDULES))
PEAK = 0.05
WARMUP, STEPS = 10, 60
AFTER = STEPS - WARMUP


def factors(name: str, steps: int = STEPS, observed: Callable[[int], float] | None = None, **options: Any) -> Any:
    """Of steps 1, 2, ...; index 0 is not a step. ``observed`` is what a schedule that measures is told after a step."""
    schedule = choose(registry.SCHEDULES, {"name": name, **options})
    at_work = schedule.build(PEAK) if schedule.measures else schedule  # type: ignore[attr-defined]
    found = [math.nan]
    for step in range(1, steps + 1):
        found.append(at_work.factor(step, steps))
        if observed is not None:
            at_work.observe(observed(step))
    return np.array(found)


def of_torch(make: Callable[[Any], Any], steps: int) -> Any:
    """torch's factors after 0, 1, ... calls of its ``step``."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


def warmed(rest: Any) -> Any:
    """A rise over ``WARMUP`` steps, then ``rest`` from its second value on: the first is that of the last of them."""
    rise = of_torch(lambda o: torchs.LinearLR(o, 1 / WARMUP, 1.0, total_iters=WARMUP - 1), WARMUP - 1)
    return np.concatenate([[math.nan], rise, rest[1 : AFTER + 1]])


def losses(step: int) -> float:
    """Falls, then lies still with a little noise, then falls again."""
    return 5 * math.exp(-step / 3) + 1 + 1e-4 * math.sin(step) - 0.5 * (step > 40)


def movements(step: int) -> float:
    """Large, small for a while, and once large again."""
    return 0.5 if step in {1, 2, 3, 30} else 0.004 + 0.05 * math.exp(-step / 6)


def plateau_of_torch() -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torchs.ReduceLROnPlateau(optimizer, factor=0.3, patience=2, threshold=1e-3, cooldown=3, min_lr=0.05)
    found = [math.nan]
    for step in range(1, STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(losses(step))
    return np.array(found)


def dynamic_by_hand(gain: float) -> Any:
    rate, moved, found = PEAK, [], [math.nan]
    for step in range(1, STEPS + 1):
        found.append(rate / PEAK)
        moved = [*moved, movements(step)][-4:]
        average = 0.8 * rate + 0.2 * gain * max(moved)
        rate = PEAK if max(moved) > 0.02 else np.clip(average, 0.1 * PEAK, PEAK)
    return np.array(found)


def triangles_of_torch(mode: str) -> Any:
    return of_torch(
        lambda o: torchs.CyclicLR(o, 0.2, 1.0, step_size_up=6, step_size_down=6, mode=mode, cycle_momentum=False), STEPS
    )


def restarts_of_torch(first: int, growth: int, ends: tuple[int, ...]) -> Any:
    """torch calls the last value of a cycle the first of the next; here the last step of a cycle has its lowest."""
    made = of_torch(lambda o: torchs.CosineAnnealingWarmRestarts(o, first, growth, 0.2), STEPS)
    made[list(ends)] = 0.2
    return made


def one_cycle_of_torch(shape: str) -> Any:
    made = of_torch(
        lambda o: torchs.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=STEPS,
            pct_start=0.3,
            anneal_strategy=shape,  # type: ignore[arg-type]
            div_factor=10,
            final_div_factor=100,
            cycle_momentum=False,
        ),
        STEPS - 1,
    )
    return np.concatenate([[math.nan], made])


def inverse_sqrt_by_hand() -> Any:
    step = np.arange(1, STEPS + 1)
    vaswani = np.minimum(step**-0.5, step * WARMUP**-1.5)  # equation 3 without the width
    return np.concatenate([[math.nan], vaswani * WARMUP**0.5])


def wsd_by_hand(shape: Callable[[Any], Any]) -> Any:
    step = np.arange(STEPS + 1.0)
    done = np.clip((step - 48) / 12, 0, 1)
    return np.minimum(step / WARMUP, 1) * (0.2 + 0.8 * shape(done))


COMMON = {"warmup_steps": WARMUP, "final": 0.2}
DYNAMIC = {"warmup_steps": 0, "window": 4, "floor": 0.02, "keep": 0.8, "lower": 0.1}
REFERENCES: dict[str, list[tuple[dict[str, Any], Callable[[], Any]]]] = {
    "constant": [({"warmup_steps": WARMUP}, lambda: warmed(np.ones(AFTER + 1)))],
    "linear": [(COMMON, lambda: warmed(of_torch(lambda o: torchs.LinearLR(o, 1.0, 0.2, AFTER), AFTER)))],
    "cosine": [(COMMON, lambda: warmed(of_torch(lambda o: torchs.CosineAnnealingLR(o, AFTER, 0.2), AFTER)))],
    "polynomial": [
        (
            {"warmup_steps": WARMUP, "final": 0.0, "power": 1.5},
            lambda: warmed(of_torch(lambda o: torchs.PolynomialLR(o, AFTER, 1.5), AFTER)),
        )
    ],
    "exponential": [
        (COMMON, lambda: warmed(of_torch(lambda o: torchs.ExponentialLR(o, 0.2 ** (1 / AFTER)), AFTER))),
    ],
    "step": [
        (
            {"warmup_steps": 0, "every": 7, "multiply": 0.6},
            lambda: np.concatenate([[math.nan], of_torch(lambda o: torchs.StepLR(o, 7, 0.6), STEPS - 1)]),
        ),
    ],
    "inverse_sqrt": [({"warmup_steps": WARMUP}, inverse_sqrt_by_hand)],
    "wsd": [
        ({**COMMON, "shape": "linear"}, lambda: wsd_by_hand(lambda u: 1 - u)),
        (COMMON, lambda: wsd_by_hand(lambda u: 1 - np.sqrt(u))),
        ({**COMMON, "shape": "cosine"}, lambda: wsd_by_hand(lambda u: np.cos(np.pi * u / 2) ** 2)),
    ],
    "cyclic": [
        ({"low": 0.2, "cycle_steps": 12}, lambda: triangles_of_torch("triangular")),
        ({"low": 0.2, "cycle_steps": 12, "shrink": 0.5}, lambda: triangles_of_torch("triangular2")),
    ],
    "cosine_restarts": [
        ({"warmup_steps": 0, "final": 0.2, "cycle_steps": 15}, lambda: restarts_of_torch(15, 1, ends=(15, 30, 45, 60))),
        (
            {"warmup_steps": 0, "final": 0.2, "cycle_steps": 8, "growth": 2.0},
            lambda: restarts_of_torch(8, 2, ends=(8, 24, 56)),
        ),
    ],
    "one_cycle": [
        ({"first": 0.1, "final": 1e-3}, lambda: one_cycle_of_torch("cos")),
        ({"first": 0.1, "final": 1e-3, "shape": "linear"}, lambda: one_cycle_of_torch("linear")),
    ],
    "plateau": [
        (
            {"warmup_steps": 0, "multiply": 0.3, "patience": 2, "threshold": 1e-3, "cooldown": 3, "final": 0.05},
            plateau_of_torch,
        )
    ],
    "dynamic": [
        (DYNAMIC, lambda: dynamic_by_hand(1.0)),
        ({**DYNAMIC, "gain": 3.0}, lambda: dynamic_by_hand(3.0)),
    ],
}


def test_every_schedule_has_a_reference():
    assert REFERENCES.keys() == set(registry.SCHEDULES)


CASES = [
    pytest.param(name, options, reference, id=f"{name}-{i}")
    for name, cases in REFERENCES.items()
    for i, (options, reference) in enumerate(cases)
]
OBSERVED = {"plateau": losses, "dynamic": movements}


@pytest.mark.parametrize(("name", "options", "reference"), CASES)
def test_against_the_reference(name, options, reference):
    found, expected = factors(name, observed=OBSERVED.get(name), **options), reference()
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-9, atol=1e-12)
    assert len(set(np.round(found[1:], 9))) > 3, "this reference would not tell schedules apart"


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_factors_are_above_zero_and_at_most_one(name, steps):
    for observed in (lambda step: 1e9, lambda step: 1.0, lambda step: 0.0, losses, movements):
        found = factors(name, steps, observed=observed if name in OBSERVED else None)[1:]
        assert np.all((found > 0) & (found <= 1)), found


@EVERY
def test_a_warm_up_rises_from_zero_to_where_the_schedule_begins(name):
    schedule = registry.SCHEDULES.load(name)
    if "warmup_steps" not in schedule.model_fields:
        return
    found = factors(name, warmup_steps=8)
    top = 0.1 if name == "cyclic" else 1.0
    np.testing.assert_allclose(found[1:9], top * np.arange(1, 9) / 8)


@EVERY
def test_the_last_step_has_the_final_factor(name):
    final = registry.SCHEDULES.load(name).model_fields.get("final")
    if final is not None and name not in OBSERVED:
        for steps in (40, 97, 1000):
            assert factors(name, steps)[-1] == pytest.approx(final.default, rel=1e-6)


@EVERY
def test_a_place_between_two_steps_has_a_factor_between_theirs(name):
    """With ``unit: tokens`` places are no whole numbers while the batch grows."""
    schedule = choose(registry.SCHEDULES, name)
    at_work = schedule.build(PEAK) if schedule.measures else schedule
    found = factors(name, 40)
    for step in range(1, 40):
        between = at_work.factor(step + 0.5, 40)
        cycles = {schedule.cycle(place, 40) for place in (step, step + 0.5, step + 1)}
        if len(cycles) == 1 and name != "cyclic":
            assert min(found[step : step + 2]) - 1e-9 <= between <= max(found[step : step + 2]) + 1e-9
    assert 0 < at_work.factor(0.25, 40) <= found[1] or name == "cyclic"


@pytest.mark.parametrize("name", list(OBSERVED))
def test_a_state_goes_through_json_and_goes_on_bit_for_bit(name):
    schedule = choose(registry.SCHEDULES, name)
    one = schedule.build(PEAK)
    for step in range(1, 60):
        one.observe(OBSERVED[name](step))
        other = schedule.build(PEAK)
        other.restore(json.loads(json.dumps(one.state())))
        assert other.state() == one.state()
        for later in range(step + 1, step + 12):
            assert other.factor(later, 90) == one.factor(later, 90)
        one = other


def test_one_cycle_of_restarts_is_a_cosine():
    one = factors("cosine_restarts", warmup_steps=WARMUP, cycle_steps=AFTER)
    np.testing.assert_allclose(one, factors("cosine", warmup_steps=WARMUP))


def test_cycles_are_numbered_and_end_where_the_rate_is_lowest():
    schedule = choose(registry.SCHEDULES, {"name": "cosine_restarts", "warmup_steps": 4, "growth": 1.7})
    cycles = [schedule.cycle(step, 104) for step in range(1, 106)]
    assert cycles == sorted(cycles) and cycles[103] == 3 and cycles[104] == 4, "four cycles fill the run"
    found = factors("cosine_restarts", 104, warmup_steps=4, growth=1.7)
    for step in range(5, 104):
        if cycles[step - 1] != cycles[step]:
            assert found[step] < found[step - 1] and found[step] < found[step + 1]


def test_defaults_that_follow_the_length_of_the_run():
    assert factors("cosine", 100)[5] == 1.0 > factors("cosine", 100)[4], "a twentieth of the run is the warm-up"
    stairs = factors("step", 63, warmup_steps=3)[4:]
    np.testing.assert_allclose(stairs, np.repeat([1, 0.1, 0.01], 20))


def test_a_loss_that_is_not_a_number_is_no_fall():
    found = factors("plateau", 12, observed=lambda step: math.nan, warmup_steps=0, patience=1, multiply=0.5)
    np.testing.assert_allclose(found[1:], np.maximum(0.01, 0.5 ** (np.arange(12) // 2)))


@pytest.mark.parametrize(("scale", "expected"), [("linear", 4.0), ("sqrt", 2.0)])
def test_scale_follows_the_sequences_of_a_step(scale, expected):
    schedule = choose(registry.SCHEDULES, {"name": "cosine", "scale": scale, "base_sequences": 8})
    assert schedule.scaled(8) == 1.0 and schedule.scaled(32) == expected
    assert choose(registry.SCHEDULES, "cosine").scaled(32) == 1.0


@pytest.mark.parametrize("options", [{"scale": "linear"}, {"base_sequences": 8}])
def test_scale_without_its_base_is_refused(options):
    with pytest.raises(ConfigError, match="scale and base_sequences go together"):
        choose(registry.SCHEDULES, {"name": "cosine", **options})
