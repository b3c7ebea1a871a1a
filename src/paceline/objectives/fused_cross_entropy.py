"""Cross-entropy of bf16 logits on CPUs as one compiled kernel: ``fused_cross_entropy.cpp`` says how it computes.

Shapes: C rows, V vocabulary.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from paceline.models.kernels import library

SOURCE = Path(__file__).with_suffix(".cpp")


def fuse_loss(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
    """Have the loss of a compiled ``model`` computed by the kernel, where there is one: in bf16 on a CPU.

    ``PlanError`` if it cannot be compiled.
    """
    if dtype is torch.bfloat16 and device.type == "cpu":
        library(SOURCE, "train.compile=true")
        model.fuses_loss = True  # type: ignore[assignment]


def fuses_loss(model: nn.Module) -> bool:
    """Whether ``fuse_loss`` was called on the model, and took it."""
    return getattr(model, "fuses_loss", False) is True


def fused_cross_entropy(logits_CV: Tensor, labels_C: Tensor, *, learns: bool) -> Tensor:
    """-log softmax(logits)[label] of each row, (C, 1) in fp32; after ``fuse_loss``.

    With ``learns`` the gradient of the losses' sum takes the place of the logits, which are dense bf16. Raises
    ``IndexError`` for a label outside the vocabulary.
    """
    assert logits_CV.dtype is torch.bfloat16 and logits_CV.is_contiguous() and labels_C.is_contiguous()
    losses_C1 = torch.empty(len(logits_CV), 1)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (logits_CV, labels_C, losses_C1)]
    sizes = [ctypes.c_int64(size) for size in logits_CV.shape]
    kernel = library(SOURCE, "train.compile=true").paceline_cross_entropy
    if kernel(*pointers, *sizes, learns, torch.get_num_threads()):
        raise IndexError(f"a label is outside of the vocabulary of {logits_CV.shape[1]} entries")
    return losses_C1
