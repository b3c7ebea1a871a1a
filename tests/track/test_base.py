import math

import pytest

from paceline.errors import TrainError
from paceline.track import Trackers
from track.runs import Memory, metrics_of


class Raising(Memory):
    """A sink that fails at one of its methods."""

    def __init__(self, method: str, error: Exception) -> None:
        super().__init__()
        self._method, self._error = method, error

    def __getattribute__(self, name: str):
        if name == object.__getattribute__(self, "__dict__").get("_method"):
            raise self._error
        return super().__getattribute__(name)


def trackers(*sinks: Memory, source: Memory | None = None) -> Trackers:
    return Trackers(source or Memory(), sinks, now=lambda: 7.0)


def test_every_sink_is_told_everything_in_order_with_the_time() -> None:
    source, one, two = Memory(), Memory(), Memory()
    run = trackers(one, two, source=source)
    run.event("start", "seed 0")
    run.step({"step": 1, "loss": 2.0})
    run.evaluation({"step": 1, "loss": 2.5, "time": 3.0})
    run.event("checkpoint", "saved")
    run.event("resume", "from 0", step=0)
    run.close()
    assert source.told == [
        ("event", {"time": 7.0, "step": 0, "kind": "start", "message": "seed 0"}),
        ("step", {"time": 7.0, "step": 1, "loss": 2.0}),
        ("evaluation", {"time": 3.0, "step": 1, "loss": 2.5}),
        ("event", {"time": 7.0, "step": 1, "kind": "checkpoint", "message": "saved"}),
        ("event", {"time": 7.0, "step": 0, "kind": "resume", "message": "from 0"}),
    ]
    assert one.told == two.told == source.told
    assert [sink.closed for sink in (source, one, two)] == [1, 1, 1]


@pytest.mark.parametrize("method", ["step", "evaluation", "event"])
def test_a_sink_that_raises_is_dropped_and_told_of_once(method: str) -> None:
    source, good, bad = Memory(), Memory(), Raising(method, OSError(28, "No space left on device"))
    run = trackers(bad, good, source=source)
    for step in (1, 2, 3):
        run.step(metrics_of(step))
        run.evaluation({"step": step, "loss": 2.0})
        run.event("checkpoint", "saved")
    warnings = [event for event in source.of("event") if event["kind"] == "warning"]
    assert [event["message"] for event in warnings] == [
        "Raising failed and is switched off: OSError: [Errno 28] No space left on device"
    ]
    assert bad.closed == 1
    assert [record["step"] for record in good.of("step")] == [1, 2, 3]
    assert [event for event in good.of("event") if event["kind"] == "warning"] == warnings


def test_sinks_that_fail_while_told_of_another_failure_are_dropped_too() -> None:
    source, last = Memory(), Memory()
    one, two = Raising("step", ValueError("one")), Raising("event", ValueError())
    run = trackers(one, two, last, source=source)
    run.step(metrics_of(1))
    run.step(metrics_of(2))
    assert [event["message"] for event in source.of("event")] == [
        "Raising failed and is switched off: ValueError: one",
        "Raising failed and is switched off: ValueError",
    ]
    assert [record["step"] for record in two.of("step")] == []
    assert [record["step"] for record in last.of("step")] == [1, 2]


def test_a_sink_that_fails_twice_at_closing_leaves_the_others_closed() -> None:
    source, good, bad = Memory(), Memory(), Raising("close", OSError("gone"))
    trackers(bad, good, source=source).close()
    assert (source.closed, good.closed) == (1, 1)
    assert [event["message"] for event in source.of("event")] == ["Raising failed and is switched off: OSError: gone"]


def test_a_failure_of_the_source_of_truth_is_an_error_and_sinks_are_closed_still() -> None:
    sink = Memory()
    run = trackers(sink, source=Raising("step", TrainError("full")))
    with pytest.raises(TrainError, match="full"):
        run.step(metrics_of(1))
    run.close()
    assert sink.closed == 1
    assert sink.of("step") == []


def test_an_interrupt_inside_a_sink_goes_through() -> None:
    class Interrupted(Memory):
        def step(self, metrics: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trackers(Interrupted()).step(metrics_of(1))


def test_a_number_that_is_not_finite_becomes_none_with_a_warning_when_it_begins() -> None:
    source = Memory()
    run = trackers(source=source)
    for step, norm in enumerate([1.0, math.inf, math.inf, 1.0, math.nan], start=1):
        run.step({"step": step, "gradient_norm": norm, "parts": {"a": [norm, 1.0]}})
    run.evaluation({"step": 5, "loss": -math.inf})
    assert [record["gradient_norm"] for record in source.of("step")] == [1.0, None, None, 1.0, None]
    assert [record["parts"]["a"][0] for record in source.of("step")] == [1.0, None, None, 1.0, None]
    assert [(event["step"], event["message"]) for event in source.of("event")] == [
        (2, "gradient_norm is inf, written as null"),
        (2, "parts.a.0 is inf, written as null"),
        (5, "gradient_norm is nan, written as null"),
        (5, "parts.a.0 is nan, written as null"),
        (5, "held-out loss is -inf, written as null"),
    ]


def test_a_kind_of_event_that_no_reader_knows_is_refused() -> None:
    with pytest.raises(AssertionError, match="lunch"):
        trackers().event("lunch", "at noon")
