import json
import os
import subprocess
import sys

import pytest

from paceline.plan.network import Network


@pytest.fixture(autouse=True)
def benchmarks(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")


@pytest.fixture
def cases():
    import wan_cases

    return wan_cases


def emulate(root, *links):
    command = [sys.executable, "benchmarks/emulator.py", *links]
    done = subprocess.run(
        command, cwd=root, env={"PYTHONPATH": str(root / "src")}, capture_output=True, text=True, timeout=30
    )
    if "NOT MEASURED" in done.stderr:
        pytest.skip(f"THE EMULATOR IS NOT TESTED HERE: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_network_delays_and_limits_the_rate_each_way(root):
    """A byte there and back takes both delays; a large message comes at the rate of the side that sends it."""
    found = emulate(root, "20mbit/30ms", "200mbit/10ms")
    assert 0.040 <= found["there_and_back_s"] <= 0.055
    assert 10e6 <= found["bits_per_s"] <= 20e6
    assert emulate(root, "200mbit/1ms")["bits_per_s"] >= 25e6


def test_a_network_that_does_not_delay_is_noticed(cases):
    """One exchange after another takes half of both ways; 4 MiB cannot be quicker than the link."""
    import wan_runs
    from emulator import Forbidden
    from meter import Probe

    given = conditions(cases, "100mbit/25ms", "50mbit/15ms")
    wan_runs.check(Probe(small_s=0.0205, bits_per_s=60e6), given)
    with pytest.raises(Forbidden, match=r"4 bytes took 12\.0 ms and not 20\.0"):
        wan_runs.check(Probe(small_s=0.012, bits_per_s=60e6), given)
    with pytest.raises(Forbidden, match="4 MiB went at 900 of 100 Mbit/s"):
        wan_runs.check(Probe(small_s=0.0205, bits_per_s=900e6), given)


def conditions(cases, link, back, **other):
    weather = cases.Weather()
    values = {"replicas": 2, "steps": 4, "warmup": 2, "mtu": 9000, "compute_s": 0.0, "weather": weather, **other}
    return cases.Conditions(link=Network.parse(link), back=Network.parse(back), **values)


class Counting:
    """A sync of 20 ms a step, half of it in a step of the replica's own."""

    def __init__(self, clock):
        self.clock = clock

    def begin(self, *_):
        self.clock.now += 0.005

    reduce = begin

    def update(self, replica):
        self.clock.now += 0.005
        replica.finish(None)

    def is_agreed(self, step):
        return step == 2


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def finish(self, _):
        self.now += 0.010


def test_time_in_the_sync_is_told_apart_and_the_rest_filled_up(monkeypatch):
    """15 ms are the sync's. Of the rest there are 10 ms of the optimizer and 4 of the model, which are made 30."""
    from meter import Meter

    clock = Clock()
    monkeypatch.setattr("meter.time", clock)
    monkeypatch.setattr("meter.sent_bytes", lambda: 7)
    meter = Meter(Counting(clock), 0.030)
    for _ in range(2):
        meter.begin()
        clock.now += 0.004
        meter.reduce()
        meter.update(clock)
        meter.stepped(None)
    assert meter.steps == [(pytest.approx(0.045), pytest.approx(0.030), 7)] * 2
    assert meter.is_agreed(2), "all else is the sync's own"


PARAMETERS = 1_606_400


@pytest.mark.parametrize("name", ["diloco", "streaming_diloco"])
def test_bytes_by_the_closed_formulas_are_those_of_the_steps_that_are_timed(cases, name):
    """Once each parameter; what a run ends with does not count."""
    given = conditions(cases, "100mbit/25ms", "100mbit/25ms", steps=200, warmup=100)
    payload, _ = cases.formulas(cases.config({"name": name, "every": 100}, given), given, 0.030)
    assert payload == pytest.approx(4 * PARAMETERS / 100, rel=1e-4)


def test_time_by_the_closed_formulas(cases):
    given = conditions(cases, "100mbit/25ms", "100mbit/25ms", steps=200, warmup=100)
    _, modelled = cases.formulas(cases.config({"name": "diloco", "every": 100}, given), given, 0.030)
    assert modelled == pytest.approx(0.030 + (8 * 4 * PARAMETERS / 1e8 + 5 * 0.025) / 100, rel=1e-4)


@pytest.mark.parametrize(
    ("sync", "name"),
    [
        ("all_reduce", "all_reduce"),
        ({"name": "diloco", "every": 30}, "diloco 30"),
        ({"name": "diloco", "every": 30, "outer": {"momentum": 0.5}}, "diloco 30 momentum=0.5"),
    ],
)
def test_what_rows_are_called(cases, sync, name):
    assert cases.name_of(cases.config(sync, conditions(cases, "1mbit/1ms", "1mbit/1ms"))) == name


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_replicas_of_paceline_are_as_slow_as_the_link(root):
    command = [sys.executable, "benchmarks/wan.py", "--sync", "all_reduce", "--link", "200mbit/5ms", "--json"]
    command += ["--steps", "6", "--warmup", "3", "--compute-ms", "10"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=100)
    if "NOT MEASURED" in done.stderr:
        pytest.skip(f"THE EMULATOR IS NOT TESTED HERE: {done.stderr}")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])
    bound = 4 * PARAMETERS
    assert bound <= found["wire_bytes"] <= 1.02 * bound
    assert found["step_s"] >= 8 * bound / 200e6
