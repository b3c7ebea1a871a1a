"""Which row is sample number n of a run: a function of (seed, stream, n), computed without replaying.

The state of the data order is one number, how many samples were consumed. Neither the ranks nor the micro-batches nor
the number of samples in a step appear in it, so all of them may change on resume.
"""

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from paceline.data.mixture import Mixture
from paceline.data.permute import Key, Permutation
from paceline.data.rows import Ints


class Order(Protocol):
    """What a loader asks of a data order."""

    warning: str | None
    """One sentence for the user where the order serves the data less evenly than asked, or None."""

    def draw(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Source (count,) and row within it (count,) of samples ``first`` to ``first + count - 1``."""
        ...

    def slots(self, first: int, count: int) -> Ints:
        """The same sample numbers (count,) in the order in which they are dealt to the ranks, one each in turn."""
        ...

    def epoch(self, position: int) -> tuple[float, ...]:
        """Passes made after ``position`` samples, over each source or stream of files."""
        ...


class SampleOrder:
    """Rows of all sources in a weighted mixture; each source is permuted anew in each of its own epochs.

    ``lengths`` are rows per source. ``stream`` names the data set: the whole of it, or one client's.
    """

    warning: str | None = None

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int, stream: str = "train") -> None:
        assert len(lengths) == len(weights) and min(lengths) > 0, (lengths, weights)
        self._lengths = [int(length) for length in lengths]
        self._mixture = Mixture(weights)
        self._key: Key = (seed, stream)

    def draw(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Source (count,) and row within it (count,) of samples ``first`` to ``first + count - 1``."""
        sources, index = self._mixture(np.arange(first, first + count))
        rows = np.empty(count, np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = shuffled(index[here], self._lengths[source], (*self._key, "source", source))
        return sources, rows

    def slots(self, first: int, count: int) -> Ints:
        """The sample numbers (count,) of a step in the order in which they are dealt to the ranks.

        A mixture repeats its pattern of sources, and dealing it round by round would give a rank only some of them: of
        two equal sources and two ranks, one each. So the samples of a step are dealt in a permuted order.
        """
        dealt = np.arange(count)
        if len(self._lengths) > 1:
            dealt = Permutation(count, (*self._key, "deal", first))(dealt)
        return first + dealt

    def epoch(self, position: int) -> tuple[float, ...]:
        """Passes made over each source after ``position`` samples."""
        counts = self._mixture.counts(position).tolist()
        return tuple(count / length for count, length in zip(counts, self._lengths, strict=True))


class FileOrder:
    """Rows of one source, its files dealt to streams of about equal size; the streams take turns.

    ``rows_per_file`` are the rows of each file, in the order of the rows. Sample n is of stream n mod ``streams``, and
    each stream permutes its own rows anew in each of its epochs. A rank that takes every R-th slot of each step reads
    only the files of its own streams when R divides both ``streams`` and the samples of a step. The number of streams
    is part of the order: fewer where fewer files have rows, and to be kept when a run goes on with another batch.
    """

    def __init__(self, rows_per_file: Sequence[int] | Ints, streams: int, seed: int, stream: str = "train") -> None:
        lengths = np.asarray(rows_per_file, np.int64)
        self.streams = min(streams, int(np.count_nonzero(lengths)))
        assert self.streams > 0, (streams, rows_per_file)
        self._first_row = np.concatenate([[0], np.cumsum(lengths)])
        self._files = _deal(lengths, self.streams)
        # Where each file's rows begin among the rows of its stream; the last entry is the size of the stream.
        self._begins = [np.concatenate([[0], np.cumsum(lengths[files])]) for files in self._files]
        self._key: Key = (seed, stream)
        sizes = [int(begins[-1]) for begins in self._begins]
        self.warning: str | None = None
        if max(sizes) > 1.2 * min(sizes):
            self.warning = (
                f"data.split=file: the {self.streams} streams of files hold {min(sizes)} to {max(sizes)} rows and are "
                "drawn equally, so the rows of small streams are seen more often. Use more files of more equal size, "
                "or data.split=sample"
            )

    def draw(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Source (count,), always 0, and row (count,) of samples ``first`` to ``first + count - 1``."""
        index, stream_of = np.divmod(np.arange(first, first + count), self.streams)
        rows = np.empty(count, np.int64)
        for stream in np.unique(stream_of).tolist():
            here, begins = stream_of == stream, self._begins[stream]
            place = shuffled(index[here], int(begins[-1]), (*self._key, "files", stream))
            nth = np.searchsorted(begins, place, side="right") - 1
            rows[here] = self._first_row[self._files[stream][nth]] + place - begins[nth]
        return np.zeros(count, np.int64), rows

    def slots(self, first: int, count: int) -> Ints:
        """The sample numbers (count,) of a step as they stand: rank r of R takes streams r mod R."""
        return np.arange(first, first + count)

    def epoch(self, position: int) -> tuple[float, ...]:
        """Passes made over each stream of files after ``position`` samples."""
        drawn = ((position - stream + self.streams - 1) // self.streams for stream in range(self.streams))
        return tuple(count / int(begins[-1]) for count, begins in zip(drawn, self._begins, strict=True))


def shuffled(index: Ints, length: int, key: Key) -> Ints:
    """Rows (k,) drawn as number ``index`` (k,) from ``length`` rows that are permuted anew in each epoch."""
    epochs, places = np.divmod(index, length)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = Permutation(length, (*key, epoch))(places[here])
    return rows


def _deal(lengths: Ints, streams: int) -> list[Ints]:
    """Files (ascending) of each stream: each file, the largest first, to the stream with the fewest rows so far."""
    dealt: list[list[int]] = [[] for _ in range(streams)]
    sizes = [(0, stream) for stream in range(streams)]
    for file in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)].tolist():
        rows, stream = heapq.heappop(sizes)
        dealt[stream].append(file)
        heapq.heappush(sizes, (rows + int(lengths[file]), stream))
    return [np.array(sorted(files), np.int64) for files in dealt]
