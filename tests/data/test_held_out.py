"""What is held out: decided by the text where there is enough of it, else the end of the stream; nothing is lost."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.data.held_out import DOCUMENT, TokenLog, is_held_out, split
from paceline.data.tokens import TokenSet, token_dtype

END = 9


def log_of(folder: Path, documents: Sequence[Sequence[int]], pieces: int = 1, keys: Sequence[int] = ()) -> TokenLog:
    """A log of these documents (without their end tokens), appended ``pieces`` tokens at a time; a token is 3 bytes."""
    log = TokenLog(folder, token_dtype(10), END)
    for place, document in enumerate(documents):
        parts = [document[start : start + pieces] for start in range(0, max(1, len(document)), pieces)]
        for part in parts:
            last = part is parts[-1]
            key = keys[place] if keys else int(hashlib.blake2b(bytes(document), digest_size=8).hexdigest(), 16)
            log.append(
                (np.array(part, np.uint32), np.array([len(part)], np.int64)),
                np.array([3 * len(part)], np.int64),
                np.array([last]),
                np.array([(0, 0, place // 2, key, 0)] if last else [], DOCUMENT),
            )
    log.close()
    return log


def three(ids: NDArray[Any]) -> int:
    return 3 * len(ids)


def cut(folder: Path, log: TokenLog, fraction: float, originals: int) -> tuple[TokenSet, TokenSet]:
    (parts,) = split([log], fraction, originals, three)
    for name, part in zip(("train", "held_out"), parts, strict=True):
        assert part.write(folder / name, log) == len(TokenSet.open(folder / name).tokens)
    return TokenSet.open(folder / "train"), TokenSet.open(folder / "held_out")


def contents(tokens: TokenSet) -> list[list[int]]:
    return [tokens.document(index).tolist() for index in range(len(tokens))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 8), max_size=7), min_size=1, max_size=8), st.integers(1, 4))
def test_a_log_keeps_documents_whatever_pieces_they_came_in(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], pieces: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    train, held_out = cut(folder, log_of(folder / "log", documents, pieces), 0.0, len(documents))
    assert contents(train) == [[*document, END] for document in documents]
    assert train.n_bytes == 3 * sum(map(len, documents))
    assert train.files.tolist() == [place // 2 for place in range(len(documents))]
    assert (len(held_out), held_out.n_bytes, len(held_out.tokens)) == (0, 0, 0)


def test_with_enough_documents_the_hash_of_each_decides(tmp_path: Path) -> None:
    documents = [[place % 8, place // 8 % 8] for place in range(128)]  # each stands twice
    train, held_out = cut(tmp_path, log_of(tmp_path / "log", documents), 0.25, 128)
    held = contents(held_out)
    assert 10 < len(held) < 60
    assert sorted([*contents(train), *held]) == sorted([*document, END] for document in documents)
    assert not {tuple(document) for document in held} & {tuple(document) for document in contents(train)}
    assert (train.n_bytes, held_out.n_bytes) == (6 * len(train), 6 * len(held))


def test_the_share_held_out_is_the_fraction() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    for fraction in (0.0, 0.01, 0.5, 0.99):
        assert abs(is_held_out(keys, fraction).mean() - fraction) < 0.005
    assert not is_held_out(0, 0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.2, 0.9]),
)
def test_of_few_documents_the_end_of_the_stream_is_held_out(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("log")
    whole = [token for document in documents for token in [*document, END]]
    train, held_out = cut(folder, log_of(folder / "log", documents), fraction, len(documents))
    first, second = train.tokens.tolist(), held_out.tokens.tolist()
    cut_through = len(first) + len(second) - len(whole)
    assert first[: len(first) - cut_through] + second == whole
    assert cut_through in (0, 1)
    assert cut_through == 0 or whole[len(first) - 2] != END
    assert all(document[-1] == END and END not in document[:-1] for document in contents(train) + contents(held_out))
    assert len(second) == min(max(-(-len(whole) * fraction // 1), len(whole) // 10), len(whole) - 1)
    assert (train.n_bytes + held_out.n_bytes) == 3 * sum(map(len, documents))
    assert held_out.n_bytes == 3 * sum(token != END for token in second)


def test_a_long_stream_gives_a_useful_run(tmp_path: Path) -> None:
    _, held_out = cut(tmp_path, log_of(tmp_path / "log", [[1] * 20_000], pieces=20_000), 0.01, 1)
    assert len(held_out.tokens) == 1024


def test_where_the_hash_picks_none_of_many_the_end_is_held_out(tmp_path: Path) -> None:
    documents = [[1, 2]] * 200
    train, held_out = cut(tmp_path, log_of(tmp_path / "log", documents, keys=[2**64 - 1] * 200), 0.01, 200)
    assert len(held_out.tokens) == 60
    assert len(train.tokens) == 540


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (10, 2)])
def test_pairs_are_held_out_whole(tmp_path: Path, count: int, held: int) -> None:
    sources = log_of(tmp_path / "s", [[place % 8] for place in range(count)])
    targets = log_of(tmp_path / "t", [[place % 8, 8] for place in range(count)])
    pairs = split([sources, targets], 0.2, count, three)
    for column, ((train, held_out), log) in enumerate(zip(pairs, (sources, targets), strict=True)):
        train.write(tmp_path / f"train{column}", log)
        held_out.write(tmp_path / f"held{column}", log)
        assert len(TokenSet.open(tmp_path / f"train{column}")) == count - held
        assert [document[0] for document in contents(TokenSet.open(tmp_path / f"held{column}"))] == [
            place % 8 for place in range(count - held, count)
        ]
