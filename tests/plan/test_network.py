import pytest

from paceline.plan.network import Network


@pytest.mark.parametrize(
    ("text", "bits_per_s", "delay_s"),
    [("100mbit/25ms", 1e8, 0.025), ("1Gbit/500us", 1e9, 0.0005), ("56kbit/1.5s", 56e3, 1.5)],
)
def test_a_link_is_a_rate_and_a_delay(text, bits_per_s, delay_s):
    assert Network.parse(text) == Network(pytest.approx(bits_per_s), pytest.approx(delay_s))


@pytest.mark.parametrize("text", ["100mbit", "25ms/100mbit", "0mbit/1ms", "-1mbit/1ms", "100 MB/25ms", ""])
def test_what_is_no_link(text):
    with pytest.raises(ValueError, match="expected a link such as 100mbit/25ms"):
        Network.parse(text)


def test_time_is_that_of_the_bytes_and_of_the_waiting():
    assert Network.parse("8mbit/10ms").seconds(500_000, 3) == pytest.approx(0.5 + 0.03)
