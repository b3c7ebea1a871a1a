import pytest

from optim.problem import build, parameters, run
from paceline.config import choose
from paceline.errors import ConfigError, PlanError
from paceline.optim.adamw import AdamW
from paceline.optim.base import check_groups, parameter_groups
from paceline.registry import OPTIMIZERS


def adamw(*groups, **options):
    return choose(OPTIMIZERS, {"name": "adamw", "groups": list(groups), **options})


def settings(options):
    return {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(parameters(), options)
        for name in group["names"]
    }


def test_matrices_decay_and_vectors_do_not():
    got = settings(adamw(lr=0.5, weight_decay=0.25))
    assert got["model.embed_tokens.weight"] == got["model.layers.1.experts"] == (0.5, 0.25)
    assert got["model.layers.1.norm.weight"] == got["model.layers.1.up.bias"] == (0.5, 0.0)


def test_a_group_has_its_own_rate_and_decay_and_the_first_that_matches_wins():
    got = settings(
        adamw(
            {"match": "*embed*", "lr_factor": 0.1, "weight_decay": 0},
            {"match": "*.bias", "weight_decay": 0.5},
            {"match": "*layers.1.*", "lr": 2.0},
            lr=0.5,
            weight_decay=0.25,
        )
    )
    assert got == {
        "model.embed_tokens.weight": (0.05, 0.0),
        "model.layers.0.up.weight": (0.5, 0.25),
        "model.layers.0.down.weight": (0.5, 0.25),
        "model.layers.0.wide.weight": (0.5, 0.25),
        "model.layers.1.experts": (2.0, 0.25),
        "model.layers.1.norm.weight": (2.0, 0.0),
        "model.layers.1.up.bias": (0.5, 0.5),
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"match": "*.w_q"}], "expected lr, lr_factor or weight_decay beside match"),
        ([{"match": "*", "lr": 1, "lr_factor": 2}], "expected lr or lr_factor, got both"),
        ([{"match": "*", "lrr": 1}], "optimizer.groups.0.lrr: unknown key, did you mean 'lr'?"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, expected):
    with pytest.raises(ConfigError, match="optimizer") as error:
        adamw(*groups)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"match": "*.query", "lr": 1}], "groups.0.match='*.query' matches no parameter that is trained"),
        ([{"match": "*", "lr": 1}, {"match": "*.bias", "lr": 1}], "matches only parameters of groups before it"),
    ],
)
def test_a_group_without_a_parameter_is_refused(groups, expected):
    options = adamw(*groups)
    with pytest.raises(PlanError) as error:
        check_groups(options, list(parameters()))
    assert expected in str(error.value)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "groups" in OPTIMIZERS.load(name).model_fields])
def test_every_optimizer_keeps_to_its_groups(name):
    """With a rate of nearly nothing a group stays where it is, and the others move as without it."""
    groups = [{"match": "*layers.0.up*", "lr_factor": 1e-12}, {"match": "*norm*", "lr_factor": 1e-12}]
    start = parameters()
    moved, _ = run(choose(OPTIMIZERS, {"name": name, "groups": groups}), 3)
    plain, _ = run(choose(OPTIMIZERS, name), 3)
    for n, p in moved.items():
        if "layers.0.up" in n or "norm" in n:
            assert (p - start[n]).abs().max() < 1e-9, n
        else:
            assert p.equal(plain[n]), n


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(PlanError, match="nothing to train"):
        build(AdamW(), {})
