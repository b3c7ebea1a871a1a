"""The sample a tokenizer is trained on is spread over the text, within its limit, and depends on the text alone."""

from paceline.data.sample import sample

TEXTS = [f"text {place} " * 100 for place in range(1000)]  # 1 to 1.1 kB each


def test_little_text_is_taken_whole() -> None:
    assert sorted(sample(TEXTS[:10], 1_000_000)) == sorted(TEXTS[:10])
    assert sample([], 10) == []


def test_much_text_is_drawn_evenly() -> None:
    kept = sample(TEXTS, 200_000)
    places = [int(text.split()[1]) for text in kept]
    assert 198_000 < sum(map(len, kept)) <= 200_000
    thirds = [sum(low <= place < low + 333 for place in places) for low in (0, 333, 666)]
    assert min(thirds) > 40, thirds


def test_the_order_of_the_texts_does_not_matter() -> None:
    assert sample(TEXTS, 50_000) == sample(reversed(TEXTS), 50_000)


def test_a_long_text_is_drawn_from_in_excerpts() -> None:
    long = "".join(f"{place:07d} " for place in range(50_000))  # 400 kB of 8 characters each
    kept = sample([long], 100_000)
    assert all(excerpt in long for excerpt in kept)
    assert 80_000 < sum(map(len, kept)) <= 100_000
    starts = sorted(int(excerpt.split()[1]) for excerpt in kept)
    assert starts[0] < 15_000
    assert starts[-1] > 35_000


def test_the_limit_is_in_bytes() -> None:
    assert sum(len(text.encode()) for text in sample(["é" * 1000, *TEXTS], 3000)) <= 3000
