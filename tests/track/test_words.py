import pytest

from paceline.track import words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (2.91349, "2.913"),
        (12.345, "12.35"),
        (21430.4, "21,430"),
        (0.0412, "0.04120"),
        (0.000012, "1.20e-5"),
        (250_000.0, "2.50e5"),
        (-3.5, "-3.500"),
    ],
)
def test_quantity_shows_four_digits(value: float | None, shown: str) -> None:
    assert words.quantity(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.0, "0"), (3e-4, "3.00e-4"), (0.01, "1.00e-2")])
def test_rate(value: float | None, shown: str) -> None:
    assert words.rate(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (4096, "4,096"),
        (99_999, "99,999"),
        (100_000, "100k"),
        (999_400, "999k"),
        (999_600, "1.00M"),
        (1_310_000, "1.31M"),
        (22_500_000_000, "22.5B"),
        (3e15, "3000T"),
    ],
)
def test_count(value: float, shown: str) -> None:
    assert words.count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (432_013_312, "412 MiB"), (2**40 * 3, "3.00 TiB")],
)
def test_size(value: int | None, shown: str) -> None:
    assert words.size(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-:--"), (-1, "0:00"), (42.4, "0:42"), (59.6, "1:00"), (3723, "1:02:03"), (183_845, "2 d 3:04:05")],
)
def test_clock(seconds: float | None, shown: str) -> None:
    assert words.clock(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.25, "1.2 s"),
        (42, "42 s"),
        (59.7, "1 min 0 s"),
        (161, "2 min 41 s"),
        (11_100, "3 h 5 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_span(seconds: float, shown: str) -> None:
    assert words.span(seconds) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(None, "-"), (0, "0 %"), (0.004, "0.4 %"), (0.31, "31 %"), (0.0996, "10 %"), (1, "100 %")]
)
def test_percent(share: float | None, shown: str) -> None:
    assert words.percent(share) == shown


def test_one_line_leaves_nothing_that_moves_a_cursor() -> None:
    assert words.one_line("a\x1b[2Jb\r\nc\x9b1m\u2028d ") == "a [2Jb c 1m d"
