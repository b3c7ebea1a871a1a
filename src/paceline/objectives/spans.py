"""Arithmetic of span corruption: how many tokens of a text are taken out, in how many spans, and which.

After ``random_spans_helper`` and ``random_spans_noise_mask`` of T5's published preprocessing. A text of n tokens
becomes

    input:   kept_0 <s_0> kept_1 <s_1> ... END         n - noise + spans + 1 tokens
    target:  <s_0> taken_0 <s_1> taken_1 ... END       noise + spans + 1 tokens

so it begins with kept tokens and ends with taken ones.
"""

from dataclasses import dataclass

import numpy as np

from paceline.data.rows import Ints


@dataclass(frozen=True)
class SpanSizes:
    """Of one text: all in tokens, but ``spans``."""

    noise: int
    spans: int
    input_tokens: int
    target_tokens: int


def span_sizes(tokens: int, density: float, mean_span_tokens: float) -> SpanSizes:
    """Sizes for a text of ``tokens``: at least one is taken and one kept, unless the text is too short for both."""
    noise = min(max(round(tokens * density), 1), tokens - 1) if tokens > 1 else 0
    spans = min(max(round(noise / mean_span_tokens), 1), noise, tokens - noise)
    return SpanSizes(noise, spans, tokens - noise + spans + 1, noise + spans + 1)


def window_tokens(input_tokens: int, density: float, mean_span_tokens: float) -> int:
    """The longest text whose input has at most ``input_tokens``; 0 if there is none."""
    tokens = 0  # the input's length never falls as the text grows
    while span_sizes(tokens + 1, density, mean_span_tokens).input_tokens <= input_tokens:
        tokens += 1
    return tokens


def corrupt(
    tokens: Ints, sizes: SpanSizes, sentinels: Ints, end: int, random: np.random.Generator
) -> tuple[Ints, Ints]:
    """Input (sizes.input_tokens,) and target (sizes.target_tokens,); all choices of spans are equally likely."""
    last = np.array([end])
    if sizes.spans == 0:
        return np.concatenate([tokens, last]), last
    kept = _partition(len(tokens) - sizes.noise, sizes.spans, random)
    taken = _partition(sizes.noise, sizes.spans, random)
    bounds = np.cumsum(np.stack([kept, taken], axis=1).ravel())[:-1]
    pieces = np.split(tokens, bounds)  # kept_0, taken_0, kept_1, ...
    marks = np.split(sentinels[: sizes.spans], sizes.spans)
    source = [piece for pair in zip(pieces[0::2], marks, strict=True) for piece in pair]
    target = [piece for pair in zip(marks, pieces[1::2], strict=True) for piece in pair]
    return np.concatenate([*source, last]), np.concatenate([*target, last])


def _partition(items: int, parts: int, random: np.random.Generator) -> Ints:
    """Sizes (parts,) of ``items`` cut into that many parts, none of them empty."""
    cuts = np.sort(np.argsort(random.random(items - 1))[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)
