"""What the masks and positions of a whole micro-batch say, before it is cut along the sequence.

Shapes: B rows, S positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from paceline.errors import PlanError

Positions = Callable[[Tensor], Tensor]


def find_documents(positions: Tensor | bool | None, mask: Tensor | bool | None) -> Tensor | None:
    """(B, S) number of each position's document, -1 where no query sees it; None where each row is one document.

    As transformers finds them: from a mask if there is one, (B, S) of padding or (B, 1, S, S) of pairs, else from
    positions (B, S) that do not go on by 1. Raises ``PlanError`` for masks that are neither padding at the end nor
    documents that do not see each other.
    """
    if isinstance(mask, Tensor):
        return _padding(mask) if mask.ndim == 2 else _from_pairs(mask)
    if not isinstance(positions, Tensor):
        return None
    documents_BS = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    return documents_BS if bool(documents_BS[:, -1].any()) else None


def positions_of(model: nn.Module) -> Positions:
    """How a model numbers positions it is not told, from ids (B, S) to (B, S).

    From 0, but for RoBERTa and its like: these begin after the number of their padding token, and do not count padding.
    """
    for module in model.modules():
        make, padding = (getattr(module, name, None) for name in ("create_position_ids_from_input_ids", "padding_idx"))
        if callable(make) and padding is not None:
            return lambda ids_BS, make=make, padding=padding: make(ids_BS, padding)  # type: ignore[misc]
    return lambda ids_BS: torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)


def _padding(mask_BS: Tensor) -> Tensor | None:
    hidden_BS = mask_BS == 0
    if not hidden_BS.any():
        return None
    if (hidden_BS.int().diff(dim=1) < 0).any():
        raise PlanError(
            "layout.context > 1 expects padding at the end of each row, but the attention mask has some before tokens. "
            "Use layout.context=1"
        )
    return torch.zeros_like(mask_BS).masked_fill(hidden_BS, -1)


def _from_pairs(mask_B1SS: Tensor) -> Tensor:
    first_BS = mask_B1SS[:, 0].int().argmax(-1)
    if mask_B1SS.shape[1] != 1 or not torch.equal(mask_B1SS[:, 0], first_BS[:, :, None] == first_BS[:, None, :]):
        raise PlanError(
            "layout.context > 1 expects an attention mask that keeps documents apart, and nothing else; this one is "
            "another. Use layout.context=1"
        )
    return first_BS
