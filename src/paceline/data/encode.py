"""Turn texts into token ids, in several processes, with the results in the order of the texts.

A process is this file run as a program. It is told the tokenizer; then for each chunk of texts it sends back their ids.
It is started anew rather than forked, since the tokenizers library leaves threads in its caller, and not by
multiprocessing, whose fork server there is one of in a process, for those who fill it with other modules. Messages are
arrays of bytes and numbers; nothing is unpickled.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, islice
from types import TracebackType
from typing import BinaryIO, Protocol, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from paceline.errors import DataError

_BATCH_BYTES = 1 << 20  # the library keeps about 50 bytes for each byte of text in a batch

Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids of all texts of a chunk one after the other (n,), and how many each text has (texts,)."""


class Chunk(Protocol):
    """Some texts that are encoded together."""

    texts: list[bytes]


C = TypeVar("C", bound=Chunk)


def encode(core: Tokenizer, texts: Sequence[bytes]) -> Encoded:
    """The ids of UTF-8 texts, without special tokens around them."""
    ids: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
    lengths: list[int] = []
    for batch in _batches(texts):
        found = [encoding.ids for encoding in core.encode_batch_fast(batch, add_special_tokens=False)]
        lengths += map(len, found)
        ids.append(np.fromiter(chain.from_iterable(found), np.uint32, count=sum(map(len, found))))
    return np.concatenate(ids), np.array(lengths, np.int64)


def _batches(texts: Sequence[bytes]) -> Iterator[list[str]]:
    batch, held = [], 0
    for text in texts:
        batch.append(text.decode())
        held += len(text)
        if held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def encode_chunks(core: Tokenizer, chunks: Iterator[C], workers: int) -> Iterator[tuple[C, Encoded]]:
    """Encode each chunk, ``workers`` at a time; the results come in order. One chunk alone is not worth a process."""
    first = list(islice(chunks, max(2, workers)))
    chunks = chain(first, chunks)
    if workers <= 1 or len(first) < 2:
        for chunk in chunks:
            yield chunk, encode(core, chunk.texts)
        return
    with ExitStack() as stack:
        processes = [stack.enter_context(_Process()) for _ in first[:workers]]
        for process in processes:
            process.send([core.to_str().encode()])
        waiting: list[tuple[C, _Process]] = []
        for chunk in chunks:
            if len(waiting) == len(processes):
                sent, process = waiting.pop(0)
                yield sent, process.receive()
            else:
                process = processes[len(waiting)]
            process.send(chunk.texts)
            waiting.append((chunk, process))
        for sent, process in waiting:
            yield sent, process.receive()


class _Process:
    """A running copy of this program. It holds one chunk at a time, so that neither side ever waits to write."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        command = [sys.executable, "-P", "-m", "paceline.data.encode"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin and self.process.stdout
        self.input, self.output = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.process.kill()
        self.output.close()
        with suppress(BrokenPipeError):
            self.input.close()
        self.process.wait()

    def send(self, texts: Sequence[bytes]) -> None:
        try:
            _write(self.input, np.array([len(text) for text in texts], np.int64), b"".join(texts))
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> Encoded:
        lengths = _read_lengths(self.output)
        n_bytes = 0 if lengths is None else int(lengths.sum()) * 4
        body = self.output.read(n_bytes)
        if lengths is None or len(body) < n_bytes:
            raise self._died()
        return np.frombuffer(body, np.uint32), lengths

    def _died(self) -> DataError:
        status = self.process.wait()
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}; SIGKILL often means too little memory"
        else:
            how = f"ended with exit status {status}; its own message stands above"
        return DataError(f"a tokenising process {how}. Nothing was cached: run again")


def _write(stream: BinaryIO, lengths: NDArray[np.int64], body: bytes) -> None:
    stream.write(len(lengths).to_bytes(8, "little") + lengths.tobytes())
    stream.write(body)
    stream.flush()


def _read_lengths(stream: BinaryIO) -> NDArray[np.int64] | None:
    """The lengths of the texts or id lists that follow; None at the end of the stream."""
    count = stream.read(8)
    return np.frombuffer(stream.read(8 * int.from_bytes(count, "little")), np.int64) if len(count) == 8 else None


def _read_texts(stream: BinaryIO) -> list[bytes] | None:
    lengths = _read_lengths(stream)
    return None if lengths is None else [stream.read(int(length)) for length in lengths]


def _serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Encode until the other side closes the line."""
    tokenizer = _read_texts(incoming)
    if tokenizer is None:
        return
    core = Tokenizer.from_str(tokenizer[0].decode())
    while (texts := _read_texts(incoming)) is not None:
        ids, lengths = encode(core, texts)
        _write(outgoing, lengths, ids.tobytes())


if __name__ == "__main__":
    # Ctrl-C reaches parent and child alike; the parent ends this by closing the line
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(sys.stdin.buffer, sys.stdout.buffer)
