"""Make one cache entry: train the tokenizer if none is given, tokenise each source, write its two parts.

tokenizer/            what AutoTokenizer loads (not where a given folder serves as it is)
0/train  0/held_out   the token sets of the first source, and so on
quarantine.jsonl      rows that could not be used
header.json           fingerprint, ids of the special tokens, counts by source
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from paceline.config import DataConfig
from paceline.data import cache
from paceline.data.counts import Counts
from paceline.data.documents import Document, documents
from paceline.data.encode import encode_chunks
from paceline.data.held_out import DOCUMENT, TokenLog, is_held_out, split
from paceline.data.quarantine import Quarantine
from paceline.data.read import BadRow, SourceFile
from paceline.data.sample import sample
from paceline.data.tokenizer import LoadedTokenizer, train
from paceline.data.tokens import token_dtype
from paceline.errors import DataError

_FORMAT = 1  # of the cache; raised whenever the same input would give another entry
_SAMPLE_BYTES = 4_000_000
_CHUNK_BYTES = 1 << 18
_PIECE_CHARACTERS = 1 << 20
_REPORT_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Build:
    """Everything that decides about an entry, and how to make it."""

    data: DataConfig
    columns: tuple[str, ...]
    sources: tuple[tuple[SourceFile, ...], ...]
    stamps: tuple[list[int], ...]
    """Of each file of all sources, before anything was read."""
    given: LoadedTokenizer | None
    vocabulary: int
    extra_tokens: tuple[str, ...]
    workers: int
    say: Callable[[str], None]

    def key(self, folder: Path) -> str:
        """Name of the entry in the cache ``folder``: a hash of everything that decides about its content."""
        hashes = iter(cache.content_hashes(chain.from_iterable(self.sources), folder))
        parts = {
            "format": _FORMAT,
            "files": [[[file.kind, file.packed, next(hashes)] for file in files] for files in self.sources],
            "cut": [self.columns, self.data.document, self.data.split, self.data.held_out, *self._labels],
            "tokenizer": self.given.fingerprint if self.given else [self.vocabulary, self.extra_tokens],
        }
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @property
    def _labels(self) -> list[str]:
        """The column that is kept for each document, if there is one."""
        return [] if self.data.label is None else [self.data.label]

    def __call__(self, folder: Path) -> None:
        """Fill the empty ``folder``."""
        tokenizer = self._tokenizer(folder / "tokenizer")
        began_s = time.monotonic()
        with Quarantine(folder / "quarantine.jsonl") as quarantine:
            by_source = [self._source(index, tokenizer, quarantine, folder) for index in range(len(self.sources))]
        for file, stamp in zip(chain.from_iterable(self.sources), self.stamps, strict=True):
            if cache.stamp_of(file) != stamp:
                raise DataError(f"{file.name} changed while it was read; run again when nothing writes to it")
        header = {
            "fingerprint": _fingerprint(folder, tokenizer),
            "special": asdict(tokenizer.special),
            "by_source": [asdict(counts) for counts in by_source],
        }
        (folder / "header.json").write_text(json.dumps(header, indent=2), encoding="utf-8")
        self._report(by_source, time.monotonic() - began_s)

    def _tokenizer(self, folder: Path) -> LoadedTokenizer:
        if self.given:
            if self.given.outer is not None:
                self.given.outer.save_pretrained(folder)
            return self.given
        share_bytes = _SAMPLE_BYTES // len(self.sources)
        texts = [text for files in self.sources for text in sample(self._training_texts(files), share_bytes)]
        self.say(
            f"training a byte-level BPE tokenizer of {self.vocabulary:,} entries"
            f" on {sum(map(len, texts)) / 1e6:.1f} M characters"
        )
        return train(texts, self.vocabulary, self.extra_tokens, folder)

    def _training_texts(self, files: tuple[SourceFile, ...]) -> Iterator[str]:
        for item in documents(files, self.columns, self.data.document, "sample", self.data.label):
            if isinstance(item, Document) and not item.empty and not is_held_out(item.key, self.data.held_out):
                yield from item.texts

    def _source(self, index: int, tokenizer: LoadedTokenizer, quarantine: Quarantine, folder: Path) -> Counts:
        """Tokenise one source and write its two parts."""
        name, files, place = self.data.sources[index].source, self.sources[index], folder / str(index)
        tally, logs = Tally(), []
        for column in range(len(self.columns)):
            items = documents(files, self.columns, self.data.document, self.data.split, self.data.label)
            kept = usable(items, tally if column == 0 else Tally(), quarantine if column == 0 else None)
            log = TokenLog(
                place / f"log{column}",
                token_dtype(tokenizer.special.vocabulary),
                tokenizer.special.end,
                labelled=bool(self._labels),
            )
            self._encode(kept, column, tokenizer, log, name)
            logs.append(log)
        if tally.documents == 0:
            raise _nothing(name, len(files), tally, quarantine, folder)
        parts = split(logs, self.data.held_out, tally.documents, tokenizer.count_bytes)
        if not len(parts[0][0].files):
            raise DataError(
                f"data.source={name!r}: data.held_out={self.data.held_out} takes all {tally.documents} documents"
                " and leaves none to train on; lower it"
            )
        tokens = [0, 0]
        for log, pair, below in zip(logs, parts, ("", "target"), strict=False):
            for which, (part, half) in enumerate(zip(pair, ("train", "held_out"), strict=True)):
                tokens[which] += part.write(place / half / below, log)
            shutil.rmtree(log.folder)
        return Counts(
            documents=len(parts[0][0].files),
            bytes=sum(train.n_bytes for train, _ in parts),
            tokens=tokens[0],
            held_out_documents=len(parts[0][1].files),
            held_out_bytes=sum(held_out.n_bytes for _, held_out in parts),
            held_out_tokens=tokens[1],
            empty=tally.empty,
            quarantined=tally.quarantined,
        )

    def _encode(
        self, items: Iterator[Document], column: int, tokenizer: LoadedTokenizer, log: TokenLog, name: str
    ) -> None:
        n_bytes, reported_s = 0, time.monotonic()
        for chunk, encoded in encode_chunks(tokenizer.core, _chunks(items, column), self.workers):
            sizes = np.array([len(text) for text in chunk.texts], np.int64)
            log.append(encoded, sizes, np.array(chunk.ends, np.bool_), np.array(chunk.meta, DOCUMENT))
            n_bytes += int(sizes.sum())
            if time.monotonic() - reported_s > _REPORT_EVERY_S:
                self.say(f"{name}: {n_bytes / 1e6:,.0f} MB tokenised")
                reported_s = time.monotonic()
        log.close()

    def _report(self, by_source: list[Counts], elapsed_s: float) -> None:
        n_bytes = sum(counts.bytes + counts.held_out_bytes for counts in by_source)
        tokens = sum(counts.tokens + counts.held_out_tokens for counts in by_source)
        quarantined = sum(counts.quarantined for counts in by_source)
        self.say(f"tokenised {n_bytes / 1e6:,.1f} MB of text into {tokens:,} tokens in {elapsed_s:.1f} s")
        if quarantined:
            self.say(f"{quarantined:,} rows could not be used; they are kept with their reasons in the data cache")


@dataclass
class Tally:
    """What came by while documents were read."""

    documents: int = 0
    empty: int = 0
    quarantined: int = 0
    first_reason: str = ""


def usable(items: Iterable[Document | BadRow], tally: Tally, quarantine: Quarantine | None) -> Iterator[Document]:
    """The documents that have text; the rest is counted, and bad rows are kept aside."""
    for item in items:
        if isinstance(item, BadRow):
            tally.quarantined += 1
            tally.first_reason = tally.first_reason or str(item)
            if quarantine:
                quarantine.add(item)
        elif item.empty:
            tally.empty += 1
        else:
            tally.documents += item.opens
            yield item


@dataclass
class _Chunk:
    """Pieces of documents that are encoded together."""

    texts: list[bytes] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    """Whether the document ends with the piece."""
    meta: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """``DOCUMENT`` for each document that ends here, without its sizes."""


def _chunks(items: Iterable[Document], column: int) -> Iterator[_Chunk]:
    """Chunks of about ``_CHUNK_BYTES``, cut by the documents alone, so that the tokens depend on nothing else."""
    chunk, held_bytes = _Chunk(), 0
    for document in items:
        for piece, ends in _pieces(document.texts[column]):
            chunk.texts.append(piece)
            chunk.ends.append(ends)
            held_bytes += len(piece)
            if ends:
                chunk.meta.append((0, 0, document.file, document.key, document.label))
            if held_bytes >= _CHUNK_BYTES:
                yield chunk
                chunk, held_bytes = _Chunk(), 0
    if chunk.texts:
        yield chunk


_LINE_START = re.compile(r"\n(?=\S)")


def _pieces(text: str) -> Iterator[tuple[bytes, bool]]:
    """A text of any length as pieces of about ``_PIECE_CHARACTERS``, and whether each is the last.

    Cut before a line that begins with a mark or letter, where byte-level tokenizers cut too: their ids are the same.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        found = _LINE_START.search(text, start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS)
        stop = found.end() if found else start + _PIECE_CHARACTERS
        yield text[start:stop].encode(), False
        start = stop
    yield text[start:].encode(), True


def _nothing(name: str, files: int, tally: Tally, quarantine: Quarantine, folder: Path) -> DataError:
    """Why a source gives not one document; bad rows are moved to where they stay when the entry is given up."""
    if not tally.quarantined:
        return DataError(f"data.source={name!r}: no text in {files} files ({tally.empty} empty documents)")
    kept = folder.with_suffix(".quarantine.jsonl")
    quarantine.flush()
    os.replace(quarantine.path, kept)
    return DataError(
        f"data.source={name!r}: {tally.first_reason}; none of its {tally.quarantined} rows can be used,"
        f" they are kept in {kept}"
    )


def _fingerprint(folder: Path, tokenizer: LoadedTokenizer) -> str:
    whole = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    for path in sorted(folder.glob("*/**/*.npy")):
        whole.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()
