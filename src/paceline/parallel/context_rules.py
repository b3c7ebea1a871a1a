"""What the class and the config of a model tell about cutting its sequence; ``context_check`` finds the rest."""

import inspect
from typing import Any

from torch import nn

from paceline.errors import PlanError
from paceline.models.attention import replaceable
from paceline.parallel.ulysses import not_divisible


def refuse(model: nn.Module, size: int) -> None:
    """Raise ``PlanError`` for what the class and the config of a model already tell."""
    name = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        raise PlanError(
            f"layout.context={size} needs a model of transformers, whose attention can be replaced; got {name}. "
            "Use layout.context=1"
        )
    hugging_face: Any = model
    if hugging_face.config.is_encoder_decoder:
        raise PlanError(
            f"layout.context={size}: {name} attends from one sequence to another, which is not cut here. "
            "Use layout.context=1"
        )
    if not any(replaceable(type(module)) for module in model.modules()):
        raise PlanError(own_attention(model, size))
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise PlanError(
            f"layout.context={size}: {name}.forward takes no position_ids, so each rank would count positions from 0. "
            "Use layout.context=1"
        )
    if kinds := sorted(_length_dependent(model)):
        raise PlanError(
            f"layout.context={size}: {name} has rope_type={kinds[0]}, whose frequencies depend on the last position of "
            "each rank. Use layout.context=1, or another rope_type, such as yarn or linear"
        )


def own_attention(model: nn.Module, size: int) -> str:
    """What to tell the user."""
    return (
        f"layout.context={size}: {type(model).__name__} runs an attention of its own, which cannot be replaced by one "
        "for sharded sequences. Use layout.context=1, or another family"
    )


def _length_dependent(model: nn.Module) -> set[str]:
    """Kinds of rotary embedding, of the whole model or by kind of layer, that change with the length of the input."""
    found = [getattr(module, "rope_type", None) for module in model.modules()]
    kinds = {kind for value in found for kind in (value.values() if isinstance(value, dict) else [value])}
    return {kind for kind in kinds if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")}


def require_divisible(model: nn.Module, size: int, tensor: int) -> None:
    """Raise ``PlanError`` if the heads that each of ``tensor`` ranks has cannot be dealt out to ``size`` ranks."""
    hugging_face: Any = model
    heads = getattr(hugging_face.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % (tensor * size):
        raise PlanError(not_divisible(heads, size, tensor))
