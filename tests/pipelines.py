"""Tiny fp64 models and micro-batches for tests of pipelines."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from paceline.models.heads import Head, auto_class
from paceline.models.tiny import TINY
from paceline.objectives.base import Batch, token_loss

OPT: dict[str, Any] = {**TINY["llama"][1], "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 24}
FAMILIES: dict[str, tuple[Head, dict[str, Any]]] = {**TINY, "opt": ("causal", OPT)}
DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
NO_DROPOUT = {"dropout": 0.0, "activation_dropout": 0.0}


class Tokens:
    """An objective without rows: the loss of the model's logits at all targets."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_loss(model, batch)


def build(family: str, layers: int, **changes: Any) -> nn.Module:
    """A model of a family, every parameter at a random value, so that no gradient hides behind a zero or one."""
    head, options = FAMILIES[family]
    options = {**options, **{key: layers for key in DEPTH if key in options}, "pad_token_id": 0, **changes}
    if family == "opt":
        options |= NO_DROPOUT
    config = AutoConfig.for_model(options.pop("model_type"), **options, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model: nn.Module = auto_class(head).from_config(config, experts_implementation="eager").double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.train()


def batch_of(head: Head, seed: int, positions: int = 7, *, rows: int = 2, masked: bool = False) -> Batch:
    """Rows of which some positions have no target, or none has one, and one row is padded where a mask can say so."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 128, (rows, length), generator=generator)

    inputs: dict[str, Tensor | bool] = {"input_ids": ids(positions)}
    if head != "causal":
        mask = torch.ones(rows, positions, dtype=torch.int64)
        mask[1:, -2:] = 0
        inputs["attention_mask"] = mask
    if head == "seq2seq":
        positions -= 2
        inputs["decoder_input_ids"] = ids(positions)
    if head != "masked":
        inputs["use_cache"] = False
    labels = ids(positions)
    labels[0, : seed % 4] = -100
    labels[:, :] = -100 if masked else labels
    return Batch(
        inputs=inputs,
        labels=labels,
        count=int((labels != -100).sum()),
        sequences=tuple(range(rows * seed, rows * (seed + 1))),
    )
