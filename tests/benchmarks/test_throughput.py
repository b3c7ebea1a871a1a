import json
import os
import subprocess
import sys

import pytest
import yaml


@pytest.fixture
def throughput(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import throughput

    return throughput


def run(throughput, setting, speed, memory=2**30):
    return throughput.Run(setting=setting, tokens_per_s=speed, peak_bytes=memory, loss=8.4, load=0.1)


def test_interval_is_students_t_on_the_logarithms(throughput):
    # Logarithms 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, t(0.95, 2) = 2.920.
    interval = throughput.Interval.of([1.1051709, 1.2214028, 1.3498588])
    assert interval.middle == pytest.approx(1.2214028)
    assert interval.low == pytest.approx(1.2214028 / 1.1836, rel=1e-4)  # exp(2.920 * 0.1 / sqrt(3))
    assert interval.high == pytest.approx(1.2214028 * 1.1836, rel=1e-4)


def test_equal_ratios_leave_no_doubt(throughput):
    interval = throughput.Interval.of([1.5] * 7)
    assert interval.low == pytest.approx(1.5) == interval.high


def test_a_single_outlier_widens_the_interval_beyond_one(throughput):
    assert throughput.Interval.of([1.2, 1.2, 1.2, 0.6]).low < 1.0


def test_the_fastest_is_the_one_with_the_best_median(throughput):
    speeds = [
        ("trainer", 100.0),
        ("trainer", 100.0),
        ("trainer", 100.0),
        ("loop", 99.0),
        ("loop", 300.0),
        ("loop", 98.0),
    ]
    runs = [run(throughput, name, speed) for name, speed in speeds] + [run(throughput, "paceline", 500.0)]
    assert throughput.fastest(runs, ours=False) == "trainer"
    assert throughput.fastest(runs, ours=True) == "paceline"


def test_pairs_take_turns_in_who_runs_first(throughput, monkeypatch):
    order = []
    monkeypatch.setattr(
        throughput, "measure", lambda name, *_, **__: order.append(name) or run(throughput, name, 1.0 + len(order))
    )
    pairs = list(throughput.in_turns("paceline", "loop", 3, throughput.Point(), steps=1, warmup=1))
    assert order == ["paceline", "loop", "loop", "paceline", "paceline", "loop"]
    assert all((mine.setting, theirs.setting) == ("paceline", "loop") for mine, theirs in pairs)


def test_findings(throughput, monkeypatch, capsys):
    speeds = {"paceline": 150.0, "paceline-2p": 200.0, "loop": 120.0, "trainer": 160.0}
    memory = {"paceline-2p": 700, "trainer": 1000}
    monkeypatch.setattr(throughput, "probe", lambda _: {"flops_per_token": 1e8, "peak_flops_per_s": 1e11})
    monkeypatch.setattr(
        throughput, "measure", lambda name, *_, **__: run(throughput, name, speeds[name], memory.get(name, 1) * 2**20)
    )
    found = throughput.compare(list(speeds), throughput.Point(), rounds=2, pairs=3, steps=4, warmup=2)
    assert found["ours"] == "paceline-2p"
    assert found["best_peer"] == "trainer"
    assert found["ratio_to_best_peer"] == pytest.approx(1.25)
    assert found["memory_ratio_to_best_peer"] == pytest.approx(0.7)
    assert len(found["runs"]) == 2 * 4 + 3 * 2
    json.dumps(found)
    shown = capsys.readouterr().out
    assert "speed 1.250 (90 % interval 1.250 to 1.250), memory 0.700" in shown
    line = next(line for line in shown.splitlines() if line.startswith("trainer "))
    assert line.split() == ["trainer", "160", "tokens/s", "1,000", "MiB", "load", "before", "0.1"]
    assert "trainer                   5       160   16.0%  1,000 MiB   8.4000" in shown


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("paceline,lop", "lop: unknown; known: paceline, paceline-compiled"),
        ("paceline", "needs one of paceline's and one of a peer's"),
        ("loop,trainer", "needs one of paceline's and one of a peer's"),
    ],
)
def test_settings_that_cannot_be_compared(throughput, settings, said):
    with pytest.raises(SystemExit, match=said):
        throughput.chosen(settings)


def test_the_config_of_the_bench_is_valid(throughput):
    from paceline.config import Config

    for setting in throughput.SETTINGS.values():
        tree = throughput.contenders.config("unused", steps=1, setting=setting, point=throughput.Point())
        assert Config.parse(yaml.safe_load(json.dumps(tree))).replicas == setting.processes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_ends_with_a_json_document(root):
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "benchmarks/throughput.py", "--quick", "--settings", "paceline,loop", "--json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio_to_best_peer"] > 0
    assert found["memory_ratio_to_best_peer"] > 0
    assert {run["setting"] for run in found["runs"]} == {"paceline", "loop"}
    assert all(8.0 < run["loss"] < 9.2 and run["peak_bytes"] > 2**28 for run in found["runs"])
