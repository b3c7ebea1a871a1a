import numpy as np
import pytest

from paceline.objectives.spans import corrupt, span_sizes, window_tokens


def restore(source, target, sentinels, end):
    """Put the taken tokens back where their sentinels stand."""
    assert source[-1] == target[-1] == end
    taken = {}
    for token in target[:-1].tolist():
        if token in sentinels:
            taken[token] = spans = []
        else:
            spans.append(token)
    return [token for piece in source[:-1].tolist() for token in taken.get(piece, [piece])]


@pytest.mark.parametrize(("length", "window", "target"), [(512, 568, 114), (256, 284, 58), (3, 2, 3)])
def test_window_fills_the_input(length, window, target):
    """568 and 114 tokens are what T5 uses for 512."""
    assert window_tokens(length, 0.15, 3.0) == window
    assert span_sizes(window, 0.15, 3.0).input_tokens == length
    assert span_sizes(window, 0.15, 3.0).target_tokens == target


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, 3.0, 8.5])
def test_the_input_never_gets_shorter_as_the_text_grows(density, mean):
    lengths = [span_sizes(tokens, density, mean).input_tokens for tokens in range(1, 400)]
    assert min(np.diff(lengths)) >= 0
    for longest in (17, 100):
        window = window_tokens(longest, density, mean)
        assert span_sizes(window, density, mean).input_tokens <= longest
        assert span_sizes(window + 1, density, mean).input_tokens > longest


@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 100])
def test_input_and_target_hold_the_whole_text(tokens, density):
    text, sentinels = np.arange(tokens), 1000 - np.arange(60)
    sizes = span_sizes(tokens, density, 3.0)
    for seed in range(20):
        source, target = corrupt(text, sizes, sentinels, 2000, np.random.default_rng(seed))
        assert (len(source), len(target)) == (sizes.input_tokens, sizes.target_tokens)
        assert restore(source, target, set(sentinels.tolist()), 2000) == text.tolist()
        assert [token for token in source if token > 900 and token < 2000] == sentinels[: sizes.spans].tolist()


def test_all_choices_of_spans_are_equally_likely():
    """6 kept and 4 taken tokens in 2 spans: 5 x 3 ways to cut them."""
    sizes, generator, draws = span_sizes(10, 0.4, 2.0), np.random.default_rng(0), 6000
    assert (sizes.noise, sizes.spans) == (4, 2)
    seen = {}
    for _ in range(draws):
        source, _ = corrupt(np.arange(10), sizes, np.array([100, 101]), 200, generator)
        seen[tuple(source.tolist())] = seen.get(tuple(source.tolist()), 0) + 1
    assert len(seen) == 15
    assert list(seen.values()) == pytest.approx([draws / 15] * 15, rel=0.2)  # four standard deviations
