"""The tokenizer: trained on the data, or the one that the user or the model brings.

A tokenizer lives in a folder that ``transformers.AutoTokenizer`` loads: ``tokenizer.json`` and
``tokenizer_config.json``. Only the ``tokenizers`` library is needed to train one and to read back what was trained;
importing transformers takes seconds. It is needed for a folder whose ``tokenizer_config.json`` names a class of
transformers, or that holds a model's ``config.json``, whose type may decide about the class: such a class may build its
own normaliser and pre-tokeniser and leave those in ``tokenizer.json`` aside, and what counts are the ids that
``AutoTokenizer`` gives.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from paceline.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_ROLES = {"<mask>": "mask_token"}
"""Roles of tokens that ``train`` is asked to reserve; any other is special without a role."""
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_DECODE_TOKENS = 1 << 16
_NAMES = ("bos", "eos", "pad", "mask", "cls", "sep", "unk")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens; None for one that the tokenizer has not."""

    vocabulary: int
    """Number of ids: the highest one + 1."""
    end: int
    """Ends every document: the end-of-text token or, in a tokenizer without (BERT's), the separator."""
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    unk: int | None = None
    sentinels: tuple[int, ...] = ()
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ... as far as the tokenizer has them."""

    def ids(self) -> dict[str, int | None]:
        """The ids by name: bos, eos, pad, mask, cls, sep, unk."""
        return {name: getattr(self, name) for name in _NAMES}


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer ready to encode."""

    core: Tokenizer
    special: SpecialTokens
    outer: Any = None
    """The transformers tokenizer around ``core``, if its class is needed; None if ``tokenizer.json`` says all."""

    def count_bytes(self, ids: NDArray[Any]) -> int:
        """UTF-8 bytes of the text that some ids stand for; to a few bytes, where the ends cut through a character."""
        blocks = (ids[start : start + _DECODE_TOKENS].tolist() for start in range(0, len(ids), _DECODE_TOKENS))
        return sum(len(self.core.decode(block, skip_special_tokens=False).encode()) for block in blocks)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides about ids."""
        whole = f"{self.core.to_str()}{self.special}"
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def train(texts: Iterable[str], vocabulary: int, extra_tokens: Sequence[str], folder: Path) -> LoadedTokenizer:
    """Train a byte-level BPE of at most ``vocabulary`` entries on ``texts`` and write it to ``folder``.

    ``<|endoftext|>`` is its first entry and serves as bos, eos and pad; ``extra_tokens`` (``<mask>``, ``<extra_id_0>``,
    ...) come next. Text comes back from its ids exactly. ``DataError`` if the vocabulary is too small.
    """
    tokens = list(dict.fromkeys([END_OF_TEXT, *extra_tokens]))
    if vocabulary < 256 + len(tokens):
        raise DataError(
            f"a vocabulary of {vocabulary} entries is too small for a byte-level tokenizer; expected at least"
            f" {256 + len(tokens)} (256 bytes and {len(tokens)} special): raise model.config.vocab_size"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    roles = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")}
    roles |= {_ROLES[token]: token for token in extra_tokens if token in _ROLES}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    folder.mkdir(parents=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return load(str(folder))


def load(name: str) -> LoadedTokenizer:
    """The tokenizer in a folder, or of that name on the Hugging Face hub; ``DataError`` if there is none to use."""
    folder = Path(name).expanduser()
    config = _read_json(folder / "tokenizer_config.json")
    plain = config.get("tokenizer_class") in _PLAIN_CLASSES and not (folder / "config.json").exists()
    if plain and (folder / "tokenizer.json").is_file():
        try:
            core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer {name!r}: tokenizer.json cannot be read: {error}") from None
        roles = {**_read_json(folder / "special_tokens_map.json"), **config}
        return _ready(name, core, {key: _text(roles.get(f"{key}_token")) for key in _NAMES})
    return _load_class(name, folder)


def _load_class(name: str, folder: Path) -> LoadedTokenizer:
    """Through transformers, for tokenizers whose class decides how text is split."""
    from transformers import AutoTokenizer

    where = str(folder) if folder.exists() else name
    try:
        outer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # whatever its many formats and the network may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {reason.rstrip('.')}; expected a folder with tokenizer.json, or a"
            " Hugging Face name"
        ) from error
    if not getattr(outer, "is_fast", False):
        raise DataError(
            f"tokenizer {name!r} ({type(outer).__name__}) runs in Python only; expected one with a tokenizer.json,"
            " which transformers writes where it can convert"
        )
    core = Tokenizer.from_str(outer.backend_tokenizer.to_str())
    return _ready(name, core, {key: _text(getattr(outer, f"{key}_token", None)) for key in _NAMES}, outer)


def _ready(name: str, core: Tokenizer, tokens: Mapping[str, str | None], outer: Any = None) -> LoadedTokenizer:
    core.no_truncation()
    core.no_padding()
    ids = {key: None if token is None else core.token_to_id(token) for key, token in tokens.items()}
    end = ids["sep"] if ids["eos"] is None else ids["eos"]
    if end is None:
        raise DataError(
            f"tokenizer {name!r} has neither an end-of-text nor a separator token; expected eos_token in its"
            " tokenizer_config.json"
        )
    sentinels: list[int] = []
    while (sentinel := core.token_to_id(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(sentinel)
    special = SpecialTokens(
        vocabulary=max(core.get_vocab(with_added_tokens=True).values()) + 1, end=end, sentinels=tuple(sentinels), **ids
    )
    return LoadedTokenizer(core, special, outer)


def check_vocabulary(tokenizer: LoadedTokenizer, name: str, vocabulary: int | None) -> None:
    """Raise ``DataError`` if the tokenizer has ids that a model of ``vocabulary`` entries has no place for."""
    entries = tokenizer.special.vocabulary
    if vocabulary is not None and entries > vocabulary:
        raise DataError(
            f"tokenizer {name!r} has {entries} entries but the model's vocabulary is {vocabulary}; set"
            f" model.config.vocab_size to at least {entries}, or leave data.tokenizer out to train one that fits"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    """A special token stands as a string, or as a map with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else str(content)
