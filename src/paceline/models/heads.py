"""What a model puts on top of its blocks, and which families of transformers have it.

causal    the next token from those before it      AutoModelForCausalLM
masked    hidden tokens from those around them     AutoModelForMaskedLM
seq2seq   a target sequence from a source sequence AutoModelForSeq2SeqLM
"""

from typing import Any, Literal, get_args

from paceline.errors import ModelError

Head = Literal["causal", "masked", "seq2seq"]

NOT_LEFT_TO_RIGHT = {
    "cpmant": "attends in both directions within its prompt",
    "xlm": "attends in both directions by default",
    "xlnet": "attends in both directions unless it is given a permutation mask",
}
"""Families that transformers lists as causal although their forward pass lets a token see those after it."""


def heads_of(family: str) -> tuple[Head, ...]:
    """The heads that transformers has for a family, in the order of ``Head``."""
    return tuple(head for head in get_args(Head) if family in _class_names(head))


def require_head(family: str, head: Head) -> None:
    """Raise ``ModelError`` unless the family has the head and can be trained with it."""
    if family not in _class_names(head):
        known = ", ".join(heads_of(family)) or "none of causal, masked, seq2seq"
        raise ModelError(
            f"model family {family!r} has no {head} head; it has: {known}. Choose an objective for one of those, "
            f"or another model."
        )
    if head == "causal" and family in NOT_LEFT_TO_RIGHT:
        raise ModelError(
            f"model family {family!r} {NOT_LEFT_TO_RIGHT[family]}, so it would see the tokens it has to predict. "
            f"Use a left-to-right family such as llama or gpt2."
        )


def auto_class(head: Head) -> Any:
    """The class of transformers that builds any family with this head."""
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[head]


def model_class(family: str, head: Head) -> Any:
    """The class of transformers for a family that has the head."""
    import transformers

    return getattr(transformers, _class_names(head)[family])


def is_encoder(family: str) -> bool:
    """Whether the family's attention looks both ways unless its config says ``is_decoder``."""
    return family in _class_names("masked") or family == "bert-generation"


def _class_names(head: Head) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }[head]
    return names
