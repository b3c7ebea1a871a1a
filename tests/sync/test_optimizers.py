"""Every optimizer under replicas that differ: its state is each replica's own, and those that cannot be are refused."""

import pytest
import torch

from loops import config, distance, run_all
from optim.test_conformance import OPTIONS
from paceline.checkpoint import load
from paceline.config import Config, choose
from paceline.errors import PlanError
from paceline.plan.run import plan_run
from paceline.registry import OPTIMIZERS, SYNCS
from tolerances import FP64_EQUAL

STEPS, STOP = 7, 5
REFUSED = {name for name in OPTIMIZERS if OPTIMIZERS.load(name).sees == "loss" or OPTIMIZERS.load(name).remakes}
TAKEN = [name for name in OPTIMIZERS if name not in REFUSED]
DIFFER = [name for name in SYNCS if not choose(SYNCS, name).keeps_equal]


def settings(name, folder, *, replicas=2, layout=None, sync=None, steps=STEPS):
    """A period that ends neither with the run nor with its first part."""
    own = {"sophia": {"every": 2}, "adamw_8bit": {"small": 200}}  # the tiny model's matrices have 256 values
    options = own.get(name, OPTIONS.get(name, {}))
    schedule = OPTIMIZERS.load(name).schedule or "linear"
    run = config(
        sync or {"name": "diloco", "every": 3},
        folder=str(folder),
        replicas=replicas,
        layout=layout or {},
        schedule={"name": schedule, "warmup_steps": 2},
        train={"steps": steps},
    )
    return Config.parse({**run.tree(), "optimizer": {"name": name, **options}})


@pytest.mark.parametrize("layout", [{}, {"shard": 2}], ids=["plain", "shard"])
def test_each_replica_has_its_own_state_and_goes_on_bit_for_bit(layout, pool, tmp_path):
    whole = run_all(pool, [settings(name, tmp_path / name / "whole", layout=layout) for name in TAKEN])
    cut = [settings(name, tmp_path / name / "cut", layout=layout) for name in TAKEN]
    first, then = run_all(pool, cut, until=STOP), run_all(pool, cut)
    for name, one, before, after in zip(TAKEN, whole, first, then, strict=True):
        for replica in range(2):
            assert one.losses[replica] == before.losses[replica] + after.losses[replica], name
            assert distance(one.states[replica], after.states[replica]) == 0.0, name
        own = [{slot: t for slot, t in full.items() if slot.startswith("optimizer/")} for full in before.states]
        if own[0]:
            assert distance(*own) > 1e-6, name
        with load(tmp_path / name / "cut" / "checkpoints", STOP) as saved:
            kinds = {saved.entry(slot).kind for slot in own[0]}
        assert kinds <= {"per_replica"} and (kinds or name == "sgd"), name


@pytest.mark.parametrize("name", ["adamw_8bit", "shampoo", "soap", "schedule_free_adamw"])
def test_with_more_replicas_state_is_dealt_out_where_a_mean_would_mean_nothing(name, pool, tmp_path):
    """Codes and their scales, factors and what stands in their bases are one replica's; iterates are averaged."""
    (stopped,) = run_all(pool, [settings(name, tmp_path)], until=STOP)
    (resumed,) = run_all(pool, [settings(name, tmp_path, replicas=3)], until=0)
    mean = {slot: (t.double() + stopped.states[1][slot].double()) / 2 for slot, t in stopped.states[0].items()}
    dealt = [slot for slot in mean if slot.startswith("optimizer/")]
    if name == "schedule_free_adamw":
        dealt = []
    if name == "adamw_8bit":  # vectors are AdamW's, in full
        coded = {slot.rpartition("/")[0] for slot in dealt if not stopped.states[0][slot].is_floating_point()}
        dealt = [slot for slot in dealt if slot.rpartition("/")[0] in coded]
        assert 0 < len(coded) < len({slot.rpartition("/")[0] for slot in mean if slot.startswith("optimizer/")})
    for replica, state in enumerate(resumed.states):
        for slot, value in state.items():
            if slot in dealt:
                assert torch.equal(value, stopped.states[replica % 2][slot]), slot
            elif not slot.startswith("sync/"):
                assert torch.allclose(value.double(), mean[slot], rtol=FP64_EQUAL, atol=1e-15), slot


def test_other_passes_of_an_optimizer_are_no_steps_of_a_replica_that_learns_alone(pool, tmp_path):
    """Sophia asks in every second step: bytes are those announced, and no target counts twice."""
    sync = {"name": "local_sgd", "every": 2}
    runs = [settings(name, tmp_path / name, sync=sync, steps=4) for name in ("sophia", "lion")]
    stopped = run_all(pool, runs, until=3)
    windows = [[state["sync/window"].tolist() for state in ran.states] for ran in stopped]
    assert [window[::2] for window in windows[0]] == [window[::2] for window in windows[1]]  # without the rates
    assert all(window[2] == 1 and window[0] > 0 for window in windows[0])
    assert stopped[0].sent_bytes == stopped[1].sent_bytes
    ended = run_all(pool, runs)
    assert ended[0].sent_bytes == ended[1].sent_bytes
    assert distance(ended[0].weights[0], ended[0].weights[1]) == 0.0


def test_another_pass_under_levels_is_exchanged_where_gradients_are(pool, tmp_path):
    """Sophia in groups of two that share gradients: a group is one replica with its rows."""
    sync = {"name": "local_sgd", "every": 2}
    (two,) = run_all(pool, [settings("sophia", tmp_path / "two", sync=sync, steps=3)])
    levels = settings("sophia", tmp_path / "groups", sync=["all_reduce", sync], replicas=[2, 2], steps=3)
    (groups,) = run_all(pool, [levels])
    assert distance(groups.states[0], groups.states[1]) == 0.0
    assert distance(two.weights[0], groups.weights[0]) <= 1e-6  # steps divide by what the second pass gave
    assert groups.losses[0] == pytest.approx(two.losses[0], rel=1e-6)


@pytest.mark.parametrize("sync", DIFFER)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_one_that_would_not_learn_from_the_mean_is_refused(name, sync, tmp_path):
    reason = "makes the weights anew" if name == "ftrl" else "compares losses of the same batch"
    for syncs, replicas in [(sync, 2), (["all_reduce", sync], [2, 2])]:
        with pytest.raises(PlanError, match=rf"sync={sync}: optimizer={name} {reason}.* Use sync=all_reduce"):
            plan_run(settings(name, tmp_path, sync=syncs, replicas=replicas))
    plan_run(settings(name, tmp_path, sync="all_reduce"))
    plan_run(settings(name, tmp_path, sync=["all_reduce", "all_reduce"], replicas=[2, 2]))
    assert {"ftrl", "lbfgs", "newton_cg"} == REFUSED
