"""Tokenising in processes gives what tokenising here gives, and a process that dies is told."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from paceline.data import encode
from paceline.data.tokenizer import train
from paceline.errors import DataError


@dataclass
class Texts:
    texts: list[bytes]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(["to be or not to be"], 270, [], tmp_path_factory.mktemp("t") / "t").core


def test_ids_do_not_depend_on_batches(core: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"to be", b"", "or nöt <|endoftext|>".encode(), b"x" * 100]
    expected = [core.encode(text.decode()).ids for text in texts]
    for batch_bytes in (1, 10, 1 << 20):
        monkeypatch.setattr(encode, "_BATCH_BYTES", batch_bytes)
        ids, lengths = encode.encode(core, texts)
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    ids, lengths = encode.encode(core, [])
    assert (len(ids), len(lengths)) == (0, 0)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7])
def test_processes_give_the_same_in_the_same_order(core: Tokenizer, workers: int, chunks: int) -> None:
    given = [Texts([f"to be {place} {part}".encode() * 50 for part in range(place)]) for place in range(chunks)]
    here = list(encode.encode_chunks(core, iter(given), 1))
    there = list(encode.encode_chunks(core, iter(given), workers))
    assert [chunk for chunk, _ in there] == given
    for (_, (ids, lengths)), (_, (same_ids, same_lengths)) in zip(here, there, strict=True):
        np.testing.assert_array_equal(ids, same_ids)
        np.testing.assert_array_equal(lengths, same_lengths)


def children() -> set[int]:
    return {int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_a_killed_process_is_told_and_no_other_is_left(core: Tokenizer) -> None:
    before = children()

    def chunks() -> Iterator[Texts]:
        for place in range(100):
            if place == 5:
                for child in children() - before:
                    os.kill(child, signal.SIGKILL)
            yield Texts([b"to be"])

    with pytest.raises(DataError, match="tokenising process was killed by SIGKILL"):
        list(encode.encode_chunks(core, chunks(), 2))
    assert children() == before


def test_a_process_ends_when_its_parent_is_gone(core: Tokenizer) -> None:
    with encode._Process() as process:
        process.send([core.to_str().encode()])
        process.send([b"to be"])
        process.receive()
        process.input.close()
        assert process.process.wait(30) == 0


def test_no_process_is_left_when_the_reader_stops(core: Tokenizer) -> None:
    before = children()
    results = encode.encode_chunks(core, (Texts([b"to be"]) for _ in range(10)), 2)
    next(results)
    assert len(children() - before) == 2
    results.close()  # type: ignore[attr-defined]
    assert children() == before
