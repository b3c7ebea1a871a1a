"""The learning-rate range test, from the command line and by its rule."""

import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from commands import paceline, tiny_config, write_texts
from paceline.recipes.lr_range import RULE, Point, RangeTest, Rising
from tolerances import FP32_LOSS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lr_range")
    write_texts(made)
    return made


def rising_run(folder: Path, *words: str):
    ended = paceline(folder, "lr-range", str(tiny_config(folder)), *words, "--json")
    assert ended.status == 0, ended
    return ended


def test_it_tries_rates_prints_some_draws_all_and_leaves_nothing_else(folder):
    ended = rising_run(folder, "replicas=2", "--from", "1e-4", "--to", "0.5", "--steps", "40", "average=ema")
    found = ended.json()
    rates = [point["rate"] for point in found["points"]]
    expected = [1e-4 * (0.5 / 1e-4) ** (i / 39) for i in range(40)]
    assert rates == pytest.approx(expected[: len(rates)], rel=1e-9) and len(rates) > 30
    assert found["rule"] == RULE and RULE in ended.out and 1e-3 < found["suggested"] < 0.25
    assert len([line for line in ended.out.splitlines() if line.count("e-") and "." in line]) >= 12, "a small table"
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "config.yaml",
        "lr-range.html",
        "texts",
    ]
    page = (folder / "lr-range.html").read_text()
    assert page.count("<svg") == 1 and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_a_layout_sees_the_same(folder):
    runs = [rising_run(folder, "--steps", "12", layout).json()["points"] for layout in ("replicas=1", "layout.shard=2")]
    assert len(runs[0]) == len(runs[1])
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=100 * FP32_LOSS)


def test_it_ends_where_the_loss_runs_away(folder):
    ended = rising_run(
        folder, "optimizer={name: sgd}", "train.clip_norm=null", "--from", "1e-2", "--to", "1e6", "--steps", "40"
    )
    found = ended.json()
    assert len(found["points"]) < 40 and found["is_within"]
    assert found["suggested"] < found["points"][-1]["rate"] / 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--from", "0.1", "--to", "0.01"], "ConfigError: from 0.1 to 0.01 in 100 steps: expected 0 < from < to"),
        (["optimizer={name: sgd}", "train.clip_norm=null", "--from", "1e30", "--to", "1e31"], "use a lower --from"),
        (["layout.tensor=3"], "PlanError"),
        (["optimizer=schedule_free_adamw", "schedule=constant"], "Try rates with optimizer=adamw"),
        (["sync=local_sgd"], "PlanError: sync=local_sgd: replicas that learn alone have losses of their own"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_one_line(folder, words, expected):
    ended = paceline(folder, "lr-range", str(tiny_config(folder)), *words)
    assert ended.status and expected in ended.err and len(ended.err.splitlines()) == 1, ended


def points(losses):
    return [Point(rate=10.0 ** (-6 + i / 10), loss=loss, smoothed=loss) for i, loss in enumerate(losses)]


def test_the_rule_is_half_the_rate_at_which_nine_tenths_of_the_fall_are_made():
    losses = [10 - 0.25 * i for i in range(41)]  # to 0: 1.0 is reached at 36
    found = RangeTest(name="x", points=points([*losses, 0.2, 0.1, 0.3, 5.0]))
    assert found.end_of_fall == pytest.approx(10**-2.4) and found.suggested == pytest.approx(10**-2.4 / 2)
    assert found.is_within and "go on to a higher rate" not in found.words()
    cut_short = RangeTest(name="x", points=points(losses[:38]))
    assert not cut_short.is_within and "go on to a higher rate" in cut_short.words()


def test_the_rate_rises_by_the_same_factor_in_every_step():
    rising = Rising(share=1e-4, count=9)
    factors = [rising.factor(step, 10) for step in range(1, 11)]
    assert factors[0] == pytest.approx(1e-4) and factors[8] == factors[9] == 1.0
    ratios = [math.log(b / a) for a, b in pairwise(factors[:9])]
    assert ratios == pytest.approx([ratios[0]] * 8)
