"""Text that a model in training makes of a prompt: short, without a cache, the same for the same weights."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""From ids (B, S) to logits (B, S, V)."""


@torch.no_grad()
def continue_text(
    logits_of: Logits,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    window: int,
    end: int | None,
    device: torch.device,
    temperature: float = 0.8,
    backward: bool = False,
) -> str:
    """Up to ``tokens`` more tokens, sampled with a generator of their own, seeing at most ``window`` tokens.

    ``backward``: the model predicts what stood before, so the prompt is an ending and the text grows to its left.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or ([end] if end is not None else [0])
    ids = ids[::-1] if backward else ids
    start = len(ids)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(tokens):
        logits_BSV = logits_of(torch.tensor([ids[-window:]], device=device))
        chances_V = torch.softmax(logits_BSV[0, -1].float() / temperature, dim=-1)
        chosen = int(torch.multinomial(chances_V, 1, generator=generator))
        if chosen == end:
            break
        ids.append(chosen)
    made = ids[start:]
    return str(tokenizer.decode(made[::-1] if backward else made))
