"""The table of syncs: what is measured again, what is not, and what the page says of it."""

import json

import pytest

import sync_table
from paceline.sync.measured import YARDSTICKS
from paceline.sync.rows import ROWS

LOSSES = dict(zip(YARDSTICKS, (3.0, 2.5, 2.0), strict=True)) | {"diloco 100": 2.25}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two rows and two seeds, with runs that take no time and lose a hundredth more with every seed."""
    trained = []

    def train(name, sync, seed, setting):
        trained.append((name, seed))
        return {"loss": LOSSES.get(name, 9.0) + 0.01 * seed, "step_ms": 12.5, "sent_bytes": 2048.0}

    monkeypatch.setattr(sync_table, "PATH", tmp_path / "measured.json")
    monkeypatch.setattr(sync_table, "PAGE", tmp_path / "syncs.md")
    monkeypatch.setattr(sync_table, "GUIDE", tmp_path / "guide.md")
    sync_table.GUIDE.write_text(sync_table.BEGIN + "old\n" + sync_table.END + "after\n")
    monkeypatch.setattr(sync_table, "ROWS", {"all_reduce": "all_reduce", "diloco 100": ROWS["diloco 100"]})
    monkeypatch.setattr(sync_table, "SEEDS", (0, 1))
    monkeypatch.setattr(sync_table, "DELTAS", {})
    monkeypatch.setattr(sync_table, "train", train)
    sync_table.PATH.write_text('{"runs": {}}')
    sync_table.trained = trained
    return sync_table


def measure(table, most_s=float("inf")):
    del table.trained[:]
    known = table.read()
    table.measure(known, most_s=most_s)
    return list(table.trained), table.read()


def test_what_is_known_is_not_run_again(table):
    ran, known = measure(table)
    assert len(ran) == 1 + 2 * 5 and ran[0] == (table.ALONE, 0)
    assert measure(table) == ([], known)
    del known["runs"]["diloco 100"]["1"]
    table.PATH.write_text(json.dumps(known))
    assert measure(table)[0] == [("diloco 100", 1)]


def test_no_run_begins_that_would_end_too_late(table):
    assert measure(table, most_s=-1)[0] == []


def test_a_row_that_has_changed_is_run_anew_and_all_are_in_another_setting(table, monkeypatch):
    everything, _ = measure(table)
    table.ROWS["diloco 100"] = {"name": "diloco", "every": 100, "outer": {"lr": 0.5}}
    assert measure(table)[0] == [("diloco 100", 0), ("diloco 100", 1)]
    monkeypatch.setattr(table, "SETTING", {**table.SETTING, "precision": "bf16"})
    assert measure(table)[0] == everything


def test_the_page_has_differences_with_their_interval_and_worth(table):
    """Losses that differ by 0.25 with every seed: no spread, and 2 ** -0.5 of the steps of all-reduce."""
    page = table.render(measure(table)[1])
    assert "| `diloco 100` | 2 | 2.2550 | +0.2500 ± 0.0000 | 71% |" in page
    assert "| all_reduce, half of the steps | 2 | 2.5050 | +0.5000 ± 0.0000 | 50% |" in page
    assert "are not finished" not in page
    slow = next(line for line in page.splitlines() if line.startswith("| `diloco 100` | 71% |"))
    assert slow.count("**") >= 4, "on both slow links it is the best"
    assert table.guide(table.read(), table.GUIDE.read_text()).splitlines()[5] == slow


def test_a_page_of_half_a_table_says_so(table):
    _, known = measure(table)
    del known["runs"]["diloco 100"]["1"]
    assert "Rows with fewer than 2 seeds are not finished" in table.render(known)
    assert "Nothing is measured yet" in table.render({"runs": {}})


def test_a_page_that_is_not_what_was_measured_is_an_error(table, monkeypatch):
    measure(table)
    monkeypatch.setattr("sys.argv", ["sync_table.py", "--page"])
    table.main()
    monkeypatch.setattr("sys.argv", ["sync_table.py", "--check"])
    table.main()
    table.GUIDE.write_text(table.GUIDE.read_text().replace("71%", "72%"))
    with pytest.raises(SystemExit, match=r"is not what measured\.json says"):
        table.main()


def test_a_round_counts_as_its_steps(table):
    """Formula and time are of a step, of which a round of clients has ten."""
    _, known = measure(table)
    shapes = table._shapes()
    options, load = table._load(table.FEDERATED, shapes, 12.5)
    assert load.steps == table.STEPS // 10 and load.compute_s == pytest.approx(0.125)
    line = next(line for line in table.render(known).splitlines() if line.startswith("| federated 10 |"))
    assert f"| {options.wire_bytes(shapes, 4, 1) / 10 / 1024:,.1f} |" in line


def test_fewer_bits_are_compared_over_seeds_of_their_own(table, monkeypatch):
    """Differences of 1, 2 and 3 hundredths: a mean of 2 and, with two degrees of freedom, 4.303 / sqrt(3) of 1."""
    losses = {"diloco 100": [2.0, 2.0, 2.0], "diloco 100 int8": [2.01, 2.02, 2.03]}
    monkeypatch.setattr(table, "DELTAS", {"diloco 100": ("diloco 100 int8",)})
    monkeypatch.setattr(table, "DELTA_SEEDS", (0, 1, 2))
    monkeypatch.setitem(table.ROWS, "diloco 100 int8", ROWS["diloco 100 int8"])
    monkeypatch.setattr(table, "train", lambda name, sync, seed, setting: {"loss": losses[name][seed]})
    known = table.read()
    table.measure(known, most_s=float("inf"), deltas=True)
    assert known["runs"] == {} and set(known["deltas"]) == set(losses), "nothing else is measured"
    assert table.read() == known
    assert table.deltas(known["deltas"])[2:] == [
        "| `diloco 100 int8` | `diloco 100` | 3 | +0.0200 | -0.0048 to +0.0448 |"
    ]
