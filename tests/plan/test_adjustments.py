"""Clipping and penalties that would not do what they say are refused, with the way out."""

import pytest

from paceline.config import Config
from paceline.errors import PlanError
from paceline.plan.run import plan_run

PENALTIES = {"l2": 0.1, "l1": 0.1, "momentum": 0.1, "max_norm": 1.0}
BOUNDS = ("clip_value", "clip_block_norm", "clip_norm")
AVERAGING = {"optimizer": "schedule_free_adamw", "schedule": "constant"}
PERTURB = {"perturb": {"at": [10], "shrink": 0.5, "noise": 0.5}}


def plan(clip=None, **sections):
    train = {"steps": 50, "clip_norm": None} | (clip or {})
    plan_run(Config.parse({"data": {"source": "unused"}, "train": train} | sections))


@pytest.mark.parametrize("key", PENALTIES)
def test_weights_in_bf16_cannot_be_pulled(key):
    with pytest.raises(PlanError, match=rf"^regularisation.{key}=.*Use precision=bf16$"):
        plan(precision="bf16_pure", regularisation={key: PENALTIES[key]})
    plan(precision="bf16", regularisation={key: PENALTIES[key]})


@pytest.mark.parametrize("optimizer", ["lbfgs", "newton_cg"])
def test_what_a_search_could_not_trust(optimizer):
    for key in BOUNDS:
        with pytest.raises(PlanError, match=rf"^train.{key}=1.0: optimizer={optimizer} .*Use train.{key}=null"):
            plan({key: 1.0}, optimizer=optimizer)
    for key, value in PENALTIES.items():
        off = "null" if key == "max_norm" else "0"
        with pytest.raises(PlanError, match=rf"^regularisation.{key}=.*Use regularisation.{key}={off}$"):
            plan(optimizer=optimizer, regularisation={key: value})
    plan(optimizer=optimizer)


@pytest.mark.parametrize("key", PENALTIES)
def test_what_would_move_weights_of_which_an_average_is_computed(key):
    if key in {"l1", "max_norm"}:
        with pytest.raises(PlanError, match=rf"^regularisation.{key}=.*only it may move"):
            plan(**AVERAGING, regularisation={key: PENALTIES[key]})
    else:
        plan(**AVERAGING, regularisation={key: PENALTIES[key]})


def test_a_restart_is_no_update():
    with pytest.raises(PlanError, match=r"^regularisation.momentum=0.1: it would take perturb for an update"):
        plan(**PERTURB, regularisation={"momentum": 0.1})
    plan(**PERTURB, regularisation={"l2": 0.1, "l1": 0.1, "max_norm": 1.0})


def test_bf16_may_be_clipped():
    plan(dict.fromkeys(BOUNDS, 1.0), precision="bf16_pure")
