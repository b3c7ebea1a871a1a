"""What a precision is: in what a model computes, in what it learns, and what a device should have for it."""

from collections.abc import Collection
from dataclasses import dataclass

from paceline.config import Config, LossScaleConfig
from paceline.errors import PlanError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision; dtypes by torch's names."""

    name: str
    compute: str
    """Of activations, and of the weights they are computed with."""
    stored: str
    """Of the parameters that learn, in memory and in checkpoints. The optimizer's states are fp32 or more."""
    units: str | None = None
    """What a device is slow without, as ``comm.device`` names it."""

    @property
    def compute_bytes(self) -> int:
        """Of a value that is computed with."""
        return BYTES[self.compute]

    @property
    def stored_bytes(self) -> int:
        """Of a value that learns."""
        return BYTES[self.stored]

    @property
    def has_masters(self) -> bool:
        """Whether weights are computed with in a copy of what learns."""
        return self.compute != self.stored

    @property
    def is_pure(self) -> bool:
        """Whether parameters learn in 16 bits, and their updates are rounded at random."""
        return self.stored_bytes == 2

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, because gradients leave the range of what is computed in."""
        return self.compute == "float16"

    def gradient_bytes(self, backward_passes: int) -> int:
        """Of a gradient, at the end of a step of so many backward passes: their sum is fp32 or more."""
        return self.stored_bytes if backward_passes == 1 else max(4, self.stored_bytes)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp64", compute="float64", stored="float64"),
        Precision(name="fp32", compute="float32", stored="float32"),
        Precision(name="bf16", compute="bfloat16", stored="float32", units="bf16"),
        Precision(name="bf16_pure", compute="bfloat16", stored="bfloat16", units="bf16"),
        Precision(name="fp16", compute="float16", stored="float32", units="fp16"),
    )
}
"""By name: those of ``precision`` in a config, and fp64, which proofs are made in."""


def resolve_precision(config: Config, units: Collection[str]) -> Precision:
    """What a config asks for, on a device with these ``units``, on which only ``auto`` depends.

    Raises ``PlanError`` as ``check_precision`` does.
    """
    check_precision(config)
    auto = "bf16" if "bf16" in units else "fp32"
    return PRECISIONS[auto if config.precision == "auto" else config.precision]


def check_precision(config: Config) -> None:
    """Raise ``PlanError`` for a precision that is not built, and for a loss scale that nothing would use."""
    if config.precision == "fp8":
        raise PlanError(
            "precision=fp8 is not built: it takes fp8 matrix units (of NVIDIA GPUs, compute capability 8.9 or newer), "
            "and there was no device with any to prove it on. Use precision=bf16"
        )
    if config.precision != "fp16" and config.loss_scale != LossScaleConfig():
        raise PlanError(
            f"loss_scale is for precision=fp16, and this run has precision={config.precision}. Leave it out, or use "
            "fp16"
        )
