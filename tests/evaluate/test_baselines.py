import gzip
import math
import random

import numpy as np
import pytest

from paceline.errors import DataError
from paceline.evaluate.baselines import ByteNgram, grams_of, gzip_bits_per_byte, ngram_bits_per_byte


def words(seed: int, n: int) -> bytes:
    rng = random.Random(seed)
    vocabulary = ["loss", "step", "rank", "replica", "shard", "token", "batch", "gradient", "of", "the", "a"]
    return " ".join(rng.choice(vocabulary) for _ in range(n)).encode()


def plain_kneser_ney(train: bytes, held_out: bytes, order: int) -> float:
    """The textbook recursion with dictionaries, one byte at a time."""
    padded = bytes(order - 1) + train
    occurrences: dict[bytes, int] = {}
    for end in range(order, len(padded) + 1):
        gram = padded[end - order : end]
        occurrences[gram] = occurrences.get(gram, 0) + 1
    levels = {order: occurrences}
    for length in range(order - 1, 0, -1):
        levels[length] = {}
        for gram in levels[length + 1]:
            levels[length][gram[1:]] = levels[length].get(gram[1:], 0) + 1

    def probability(context: bytes, byte: int) -> float:
        shorter = 1 / 256 if not context else probability(context[1:], byte)
        counts = {gram: n for gram, n in levels[len(context) + 1].items() if gram[:-1] == context}
        if not counts:
            return shorter
        own = max(counts.get(context + bytes([byte]), 0) - 0.75, 0)
        return (own + 0.75 * len(counts) * shorter) / sum(counts.values())

    text = bytes(order - 1) + held_out
    bits = [-math.log2(probability(text[i - order + 1 : i], text[i])) for i in range(order - 1, len(text))]
    return sum(bits) / len(bits)


def test_gzip_counts_the_whole_file() -> None:
    text = words(0, 300)
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_is_kneser_ney(order: int) -> None:
    train, held_out = words(1, 60), words(2, 8) + b" unseen \xff\x00"
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(
        plain_kneser_ney(train, held_out, order), rel=1e-12
    )


@pytest.mark.parametrize("context", [b"the ", b"oken", b"\x00\x00\x00\x00", b"\xff\xfe\xfd\xfc", b"zz l", b"he \x00"])
def test_ngram_probabilities_sum_to_one(context: bytes) -> None:
    model = ByteNgram(words(3, 500))
    last = int(grams_of(context, 4)[-1])
    p = model.probabilities((np.uint64(last) << np.uint64(8)) + np.arange(256, dtype=np.uint64))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()


def test_order_five_sees_four_bytes_before_and_no_more() -> None:
    train = (b"1abcdX" + b"2abcdY") * 200  # what follows abcd is only told by the fifth byte before
    x = b"1abcdX"
    five, six = ByteNgram(train, 5), ByteNgram(train, 6)
    assert five.probabilities(grams_of(x, 5)[-1:])[0] == pytest.approx(0.5, abs=0.01)
    assert six.probabilities(grams_of(x, 6)[-1:])[0] > 0.99


def test_ngram_learns_from_the_training_text() -> None:
    held_out = words(5, 300)
    assert ngram_bits_per_byte(words(4, 3000), held_out) < 1.3
    assert ngram_bits_per_byte(random.Random(0).randbytes(20_000), held_out) > 7


def test_random_bytes_cost_eight_bits_without_a_context() -> None:
    rng = random.Random(6)
    assert ngram_bits_per_byte(rng.randbytes(200_000), rng.randbytes(20_000), order=1) == pytest.approx(8, abs=0.01)


def test_one_byte_is_enough() -> None:
    assert 0 < ngram_bits_per_byte(b"a", b"a") < 1
    assert ngram_bits_per_byte(b"a", b"b") > 8


def test_empty_texts_are_refused() -> None:
    with pytest.raises(DataError, match="held-out text is empty"):
        gzip_bits_per_byte(b"")
    with pytest.raises(DataError, match="held-out text is empty"):
        ngram_bits_per_byte(b"a", b"")
    with pytest.raises(DataError, match="training text is empty"):
        ngram_bits_per_byte(b"", b"a")
