"""Whether what a client says is of the right form: it may be of another version, or lie."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from paceline.sync.server import messages as m

_KEY = re.compile(r"[0-9a-f]{64}")
_SECRET_SHARE = re.compile(r"[0-9a-f]{132}")
_SEALED = re.compile(r"(?:[0-9a-f]{2}){1,4096}")


def problem_of(said: Any, like: Mapping[str, Tensor]) -> str | None:
    """Why it is not, or None. ``like``: tensors as those of an update have to be, by name."""
    match said:
        case m.Next(after):
            return None if _is_number(after) else "the number of a round is none"
        case m.HandIn(step, numbers, update):
            if not _is_number(step) or not isinstance(numbers, tuple) or len(numbers) != 5:
                return "it is no update"
            if not all(isinstance(number, int | float) for number in numbers):
                return "it is no update"
            return _no_update(update, like)
        case m.Came(step):
            return None if _is_number(step) else "the number of a round is none"
        case m.Advertise(step, masks, seals):
            is_good = _is_number(step) and _is_word(masks, _KEY) and _is_word(seals, _KEY)
            return None if is_good else "they are no keys"
        case m.Share(step, sealed):
            return None if _is_number(step) and _are_words(sealed, _SEALED) else "they are no shares"
        case m.Open(step, masks, keys):
            is_good = _is_number(step) and _are_words(masks, _SECRET_SHARE) and _are_words(keys, _SECRET_SHARE)
            return None if is_good else "they are no shares"
    return f"{type(said).__name__} is nothing that a client says"


def _no_update(update: Any, like: Mapping[str, Tensor]) -> str | None:
    if not isinstance(update, dict) or update.keys() != like.keys():
        return "it is no update of this model's parameters"
    for name, own in like.items():
        tensor = update[name]
        if not isinstance(tensor, Tensor) or tensor.shape != own.shape or tensor.dtype != own.dtype:
            return f"its {name} is not of shape {tuple(own.shape)} and {own.dtype}"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"its {name} is not finite"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_word(value: Any, form: re.Pattern[str]) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _are_words(values: Any, form: re.Pattern[str]) -> bool:
    return isinstance(values, dict) and all(_is_number(key) and _is_word(word, form) for key, word in values.items())
