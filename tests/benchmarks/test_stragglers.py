"""What the benchmark of unequal replicas makes of the times that it is told."""

import pytest


@pytest.fixture
def stragglers(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import stragglers

    return stragglers


def test_shares_of_the_ideal(stragglers):
    """Two replicas, 1 s and 4 s a step: the quick one is done with four steps when the other has taken one of two."""
    given = stragglers.Conditions(steps=4, replicas=2, quick_s=1.0, slow_s=4.0, at_times=False)
    assert given.ideal == 1.25
    quick = [(float(i), float(i + 1)) for i in range(4)]
    told = [
        {"ends": quick, "end": 8.0, "words": None},
        {"ends": [(0.0, 4.0), (4.0, 8.0)], "end": 8.0, "words": None},
    ]
    result = stragglers.judged("any", given, told)
    assert result.at_work == pytest.approx(5 / 4 / 1.25)
    assert result.whole == pytest.approx(6 / 8 / 1.25) and result.steps == [4, 2]


def test_replicas_that_are_slow_at_times_are_so_in_one_step_of_eight(stragglers):
    given = stragglers.Conditions(steps=4, replicas=2, quick_s=0.2, slow_s=0.8, at_times=True)
    drawn = [given.seconds(replica, count) for replica in range(2) for count in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(given.replicas / given.ideal, rel=0.03)
    assert drawn == [given.seconds(replica, count) for replica in range(2) for count in range(4000)]
