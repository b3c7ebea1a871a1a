"""The text that a tokenizer is trained on: a few megabytes, drawn evenly from any amount of text in one pass."""

import hashlib
import heapq
from collections.abc import Iterable

_EXCERPT_CHARACTERS = 1 << 14


def sample(texts: Iterable[str], limit_bytes: int) -> list[str]:
    """Excerpts of at most ``limit_bytes`` (UTF-8) together, or everything where there is less.

    Each excerpt has the same chance wherever it stands: those with the smallest hashes are kept. So the sample is a
    function of the texts alone.
    """
    kept: list[tuple[int, str]] = []  # a heap, the largest hash first
    held_bytes = 0
    for text in texts:
        for start in range(0, len(text), _EXCERPT_CHARACTERS):
            excerpt = text[start : start + _EXCERPT_CHARACTERS]
            raw = excerpt.encode()
            # a hash of its own: the plain one decides what is held out, and would draw from there
            rank = hashlib.blake2b(raw, digest_size=8, person=b"sample").digest()
            heapq.heappush(kept, (-int.from_bytes(rank, "little"), excerpt))
            held_bytes += len(raw)
            while held_bytes > limit_bytes:
                held_bytes -= len(heapq.heappop(kept)[1].encode())
    return [excerpt for _, excerpt in sorted(kept)]
