"""From the sources of a config to token sets in the cache: found, cut, tokenised, held out; once for all processes."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.config import DataConfig
from paceline.data import cache
from paceline.data.build import Build
from paceline.data.counts import Counts, Statistics
from paceline.data.documents import check
from paceline.data.hub import fetch
from paceline.data.read import SourceFile, find, looks_like_hub_name
from paceline.data.tokenizer import SpecialTokens, check_vocabulary, load
from paceline.data.tokens import TokenSet
from paceline.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised data, ready to be dealt out."""

    tokenizer: Path
    """Folder that ``AutoTokenizer.from_pretrained`` loads."""
    train: tuple[TokenSet, ...]
    """One for each source, in the order of the config."""
    held_out: tuple[TokenSet, ...]
    """One for each source; some may be empty."""
    fingerprint: str
    """Equal if and only if the token sets and the tokenizer are equal."""
    special: SpecialTokens
    statistics: Statistics


def prepare(
    data: DataConfig,
    *,
    columns: tuple[str, ...],
    vocabulary: int | None,
    tokenizer: str | None,
    extra_tokens: Sequence[str] = (),
    workers: int = 1,
    say: Callable[[str], None] = _log.info,
) -> Prepared:
    """Tokenise the data of a config into the cache, or open what is there.

    ``columns``: the column of tables that holds the text, or (source, target) for pairs. ``tokenizer``: folder or hub
    name of the model's own; ``data.tokenizer`` goes before it. Without either, a byte-level BPE of ``vocabulary``
    entries is trained on the data, with ``extra_tokens`` (``<mask>``, ...) among them. ``vocabulary``: rows of the
    model's embedding, None if they follow the tokenizer. ``workers``: processes that tokenise; the result does not
    depend on it. Many processes may call at once: one works, the others wait.

    Raises ``DataError`` if anything is wrong with the data, the tokenizer or the cache, and ``MissingExtraError`` if
    the data is a dataset of the Hugging Face hub and ``datasets`` is not installed.
    """
    folder = cache.default_folder(data.cache)
    wanted = columns if data.label is None else (*columns, data.label)
    sources = tuple(_files(source.source, wanted, folder, say) for source in data.sources)
    for files in sources:
        check(files, data.document, data.split, columns, data.label)
    name = data.tokenizer or tokenizer
    given = load(name) if name else None
    if given and name:
        check_vocabulary(given, name, vocabulary)
    elif vocabulary is None:
        raise DataError("no tokenizer and no vocabulary size: set data.tokenizer or model.config.vocab_size")
    build = Build(
        data=data,
        columns=columns,
        sources=sources,
        stamps=tuple(cache.stamp_of(file) for files in sources for file in files),
        given=given,
        vocabulary=vocabulary or 0,
        extra_tokens=tuple(extra_tokens),
        workers=workers,
        say=say,
    )
    entry = cache.entry(folder, build.key(folder), build, say)
    as_given = name and given and given.outer is None
    return _open(entry, Path(name).expanduser() if as_given and name else entry / "tokenizer")


def _files(source: str, columns: Sequence[str], folder: Path, say: Callable[[str], None]) -> tuple[SourceFile, ...]:
    if looks_like_hub_name(source):
        return (fetch(source, columns, folder / "hub", say),)
    return find(source)


def _open(entry: Path, tokenizer: Path) -> Prepared:
    header = json.loads((entry / "header.json").read_text(encoding="utf-8"))
    by_source = tuple(Counts(**counts) for counts in header["by_source"])
    places = [entry / str(index) for index in range(len(by_source))]
    return Prepared(
        tokenizer=tokenizer,
        train=tuple(TokenSet.open(place / "train") for place in places),
        held_out=tuple(TokenSet.open(place / "held_out") for place in places),
        fingerprint=header["fingerprint"],
        special=SpecialTokens(**header["special"] | {"sentinels": tuple(header["special"]["sentinels"])}),
        statistics=Statistics.of(by_source, entry / "quarantine.jsonl"),
    )
