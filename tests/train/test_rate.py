"""The rate of a step: places in steps and in tokens, scale, cycles, and what is measured when."""

import pytest

from paceline.config import Config
from paceline.plan.run import plan_batches
from paceline.train.rate import Rate

STEPS = 40
GROWING = {"sequences": 8, "warmup": {"start": 2, "steps": 6, "by": 2}}


def rate(schedule, batch=None, **sections):
    tree = {"data": {"source": "x"}, "train": {"steps": STEPS}, "schedule": schedule, "batch": batch or {}}
    config = Config.parse({**tree, "optimizer": {"name": "adamw", "lr": 0.5}, **sections})
    return Rate(config, plan_batches(config)), config.schedule


SIZES = [2, 2, 4, 4, 6, 6] + [8] * (STEPS - 6)


def test_tokens_move_a_schedule_on_by_what_a_step_really_had():
    found, schedule = rate({"name": "linear", "unit": "tokens", "warmup_steps": 3}, GROWING)
    seen = 0
    for step, size in enumerate(SIZES, start=1):
        expected = schedule.factor((seen + size) / 8, sum(SIZES) / 8)
        assert found.factor(step, seen) == pytest.approx(expected, rel=1e-12)
        seen += size
    assert found.factor(1, 0) == pytest.approx(2 / 8 / 3), "a quarter of a step of three"
    assert found.factor(STEPS, sum(SIZES[:-1])) == pytest.approx(0.1), "it ends where the run does"


def test_without_growth_tokens_and_steps_are_the_same():
    by_steps, by_tokens = (rate({"name": "cosine", "unit": unit})[0] for unit in ("steps", "tokens"))
    for step in range(1, STEPS + 1):
        assert by_tokens.factor(step, 8 * (step - 1)) == by_steps.factor(step, 8 * (step - 1))


def test_after_a_change_of_the_batch_tokens_count_what_was_seen():
    """Half the run at 8 sequences, as the checkpoint says; then the config says 4."""
    found, schedule = rate({"name": "linear", "unit": "tokens", "warmup_steps": 0}, {"sequences": 4})
    assert found.factor(21, 160) == pytest.approx(schedule.factor(164 / 4, (160 + 80) / 4))


@pytest.mark.parametrize(("scale", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_scale_is_that_of_each_step_s_own_batch(scale, power):
    found, _ = rate({"name": "constant", "scale": scale, "base_sequences": 4}, GROWING)
    for step, size in enumerate(SIZES, start=1):
        assert found.factor(step, 0) == pytest.approx((size / 4) ** power)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_cycles_end_at_the_step_with_the_lowest_rate(unit):
    found, _ = rate({"name": "cosine_restarts", "unit": unit, "warmup_steps": 4}, None)
    ends = [step for step in range(1, STEPS + 1) if found.ends_cycle(step, 8 * (step - 1))]
    assert ends == [13, 22, 31, 40]
    assert all(found.factor(step, 8 * (step - 1)) == pytest.approx(0.1) for step in ends)
    assert not any(rate("cosine")[0].ends_cycle(step, 8 * (step - 1)) for step in range(1, STEPS + 1))


def test_only_the_evaluations_of_the_config_lower_the_rate():
    plateau = {"name": "plateau", "warmup_steps": 0, "patience": 0, "multiply": 0.5}
    found, _ = rate(plateau, evaluate={"every": 10})
    for step, loss in ((10, 2.0), (13, 9.0), (20, 2.0), (40, 1.0), (40, 1.0)):
        found.evaluated(step, loss)
    assert found.factor(21, 0) == 0.25, "13 was not due; 20 and the second 40 did not bring it down"


def test_the_state_of_another_schedule_is_not_taken():
    plateau, _ = rate({"name": "plateau", "warmup_steps": 0, "patience": 0}, evaluate={"every": 1})
    for _ in range(2):
        plateau.evaluated(1, 1.0)
    state = plateau.state()
    assert state["name"] == "plateau" and plateau.factor(1, 0) == pytest.approx(0.3)
    for schedule, factor in (("plateau", 0.3), ("dynamic", 1.0), ("constant", 1.0)):
        options = {"name": schedule, "warmup_steps": 0}
        other, _ = rate(options, evaluate={"every": 1})
        other.restore(state)
        assert other.factor(5, 0) == pytest.approx(factor)
        other.restore(None)
