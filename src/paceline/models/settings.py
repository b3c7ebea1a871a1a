"""Check a model's config as the user wrote it.

Transformers takes any key and most values in silence: a typo leaves the default in place, and a size that does not fit
fails deep inside a forward pass. Here every problem is found before anything is built, and all are raised at once.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from paceline.errors import ConfigError
from paceline.models.heads import is_encoder

ELSEWHERE = {
    "dtype": "set precision instead",
    "torch_dtype": "set precision instead",
    "attn_implementation": "set model.attention instead",
}
"""Keys that transformers knows and paceline sets itself."""

AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
    "embedding_size",
    "d_ff",
)
SIZE = re.compile(r"^(num|n|d)_|_(size|dim|layers|heads)$")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DECODER_START = "decoder_start_token_id"


def hugging_face_config(settings: Mapping[str, Any], token_ids: Mapping[str, int], where: str = "model.config") -> Any:
    """The config object of transformers for ``settings``: a map with ``model_type`` and any of that family's fields.

    Token ids that ``settings`` does not give are those of ``token_ids``, or are unset where the family allows it: a
    family's defaults belong to its own tokenizer, and a padding id among them would keep that row of the embedding at
    zero. (Encoders keep their padding id: some count positions from it.) Raises ``ConfigError`` with all problems.
    """
    config_class = _class_of(settings["model_type"], where)
    given = {key: value for key, value in settings.items() if key != "model_type"}
    if problems := [*_unknown_keys(config_class, given, where), *_sizes(config_class, given, where)]:
        raise ConfigError(problems)
    try:
        config = config_class(**{**_ids(config_class, token_ids), **given})
    except Exception as error:  # each family raises what it likes
        raise ConfigError(_sentence(error, where)) from error
    start = first_token(config)
    is_open = start is not None or not hasattr(config, DECODER_START)  # families with a number of their own want one
    if config.is_encoder_decoder and DECODER_START not in given and is_open:
        config.decoder_start_token_id = start
    return config


def first_token(config: Any) -> int | None:
    """What a decoder that follows an encoder starts from if nothing else is said: padding, as T5 has it, bos or eos."""
    ids = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id"))
    return next((token for token in ids if token is not None), None)


def known_keys(config_class: Any) -> set[str]:
    """What a family's config reads: its fields, their aliases, and older spellings that it still translates."""
    keys = {field.name for field in dataclasses.fields(config_class)}
    keys |= {name for pair in config_class.attribute_map.items() for name in pair}
    keys |= {name for name, _ in inspect.getmembers(config_class, lambda member: isinstance(member, property))}
    for base in config_class.__mro__:
        if "__post_init__" in vars(base):
            # Older spellings arrive here as **kwargs and are named by string constants; derived values, which a saved
            # config also holds, are named as attributes.
            code = inspect.unwrap(vars(base)["__post_init__"]).__code__
            keys |= {
                word for word in (*code.co_consts, *code.co_names) if isinstance(word, str) and word.isidentifier()
            }
    if config_class.is_encoder_decoder:
        keys.add(DECODER_START)  # read from the config of every encoder-decoder, though not every one declares it
    if "rope_parameters" in keys:
        keys |= {"rope_theta", "partial_rotary_factor"}
    return keys - set(ELSEWHERE)


def _class_of(family: Any, where: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        near = _nearest(str(family), CONFIG_MAPPING) or "for example llama, gpt2, qwen3, bert or t5"
        raise ConfigError(f"{where}.model_type={family!r}: unknown model family, {near}")
    return CONFIG_MAPPING[family]


def _unknown_keys(config_class: Any, given: Mapping[str, Any], where: str) -> list[str]:
    known = known_keys(config_class)
    problems = []
    for key in given:
        if key in ELSEWHERE:
            problems.append(f"{where}.{key}: not read here, {ELSEWHERE[key]}")
        elif key not in known:
            hint = (
                _nearest(key, known) or f"{config_class.model_type} has: {', '.join(sorted(_own_fields(config_class)))}"
            )
            problems.append(f"{where}.{key}: unknown key, {hint}")
        elif isinstance(given[key], Mapping) and (part := config_class.sub_configs_defaults.get(key)):
            inner = part.config_class
            if dataclasses.is_dataclass(inner):
                rest = {name: value for name, value in given[key].items() if name != "model_type"}
                problems += _unknown_keys(inner, rest, f"{where}.{key}")
    return problems


def _own_fields(config_class: Any) -> set[str]:
    """The fields a family adds to those that every config has."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - common


def _sizes(config_class: Any, given: Mapping[str, Any], where: str) -> list[str]:
    """Numbers that are out of range or do not divide, in terms of the keys the user wrote."""
    aliases = config_class.attribute_map
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = defaults | {aliases.get(key, key): value for key, value in given.items()}
    spelled = {aliases.get(key, key): key for key in given}
    positive = {aliases.get(key, key) for key in AT_LEAST_ONE}

    def number(name: str) -> int | None:
        value = values.get(aliases.get(name, name))
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def written(name: str) -> str:
        name = aliases.get(name, name)
        return f"{spelled.get(name, name)}={values[name]}"

    def shown(name: str) -> str:
        default = "" if aliases.get(name, name) in spelled else f" (the default of {config_class.model_type})"
        return f"{where}.{written(name)}{default}"

    problems = []
    for name, key in spelled.items():
        value = number(name)
        least = 1 if name in positive else 0
        if value is not None and (name in positive or SIZE.search(name)) and value < least:
            problems.append(f"{where}.{key}={value}: expected at least {least}")
    if problems:
        return problems

    width, heads, kv_heads, head = map(
        number, ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if width and heads and head is None:
        if width % heads and any(aliases.get(name, name) in spelled for name in ("hidden_size", "num_attention_heads")):
            problems.append(
                f"{shown('num_attention_heads')}: does not divide {written('hidden_size')}, {_divisors(width, heads)}"
            )
        elif width % heads == 0:
            head = width // heads
    if heads and kv_heads and heads % kv_heads and not problems:
        problems.append(
            f"{shown('num_key_value_heads')}: does not divide {written('num_attention_heads')}, "
            f"{_divisors(heads, kv_heads)}"
        )
    if head and head % 2 and "rope_parameters" in defaults and not problems:
        cause = "head_dim" if number("head_dim") else "num_attention_heads"
        problems.append(f"{shown(cause)}: gives heads of width {head}, but rotary positions need an even width")
    experts, chosen = number("num_experts"), number("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        problems.append(f"{shown('num_experts_per_tok')}: expected at most the number of experts, {experts}")
    return problems + _activations(given, where)


def _ids(config_class: Any, token_ids: Mapping[str, int]) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for field in dataclasses.fields(config_class):
        may_be_unset = field.name != "pad_token_id" or not is_encoder(config_class.model_type)
        if field.name in token_ids:
            ids[field.name] = token_ids[field.name]
        elif field.name in TOKEN_IDS and may_be_unset and "None" in str(field.type):
            ids[field.name] = None
    return ids


def _activations(given: Mapping[str, Any], where: str) -> list[str]:
    names = [key for key in ACTIVATIONS if isinstance(given.get(key), str)]
    if not names:
        return []
    from transformers.activations import ACT2FN

    def hint(name: str) -> str:
        return _nearest(name, ACT2FN) or "for example silu or gelu"

    unknown = [key for key in names if given[key] not in ACT2FN]
    return [f"{where}.{key}={given[key]!r}: unknown activation, {hint(given[key])}" for key in unknown]


def _divisors(number: int, near: int) -> str:
    """Name the divisors of ``number`` on both sides of ``near``."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < near][-2:]
    above = [divisor for divisor in divisors if divisor > near][:2]
    return f"use for example {' or '.join(str(divisor) for divisor in below + above)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def _sentence(error: Exception, where: str) -> str:
    """One line from the validation errors of transformers, which take several."""
    text = " ".join(str(error).split())
    if found := re.search(r"Field '(\w+)' expected (.+?), got \w+ \(value: (.+)\)$", text):
        return f"{where}.{found[1]}={found[3]}: expected {found[2]}"
    if found := re.search(r"Validation error for field '(\w+)': \w+: (.+)$", text):
        return f"{where}.{found[1]}: {found[2][0].lower()}{found[2][1:]}"
    return f"{where}: {text.rpartition('Error: ')[2]}"
