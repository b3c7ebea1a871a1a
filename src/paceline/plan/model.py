"""What the plan knows of a model: sizes, as plain data."""

from dataclasses import dataclass

FLOPS_FORMULA = "6 N + 12 L D S per token (PaLM, arXiv 2204.02311 appendix B), N without a lookup-only embedding"


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Counts that memory and operations follow from."""

    parameters: int
    trainable: int
    lookup_parameters: int = 0
    """Of an input embedding that is not also the output head: read, never multiplied."""
    experts: int = 0
    """Parameters of modules of experts, which ``layout.expert`` deals out."""
    tensors: int = 0
    layers: int = 0
    width: int = 0
    vocabulary: int = 0

    def flops_per_token(self, sequence_tokens: int) -> float:
        """Operations of forward and backward for one token, by ``FLOPS_FORMULA``."""
        multiplied = self.parameters - self.lookup_parameters
        return 6 * multiplied + 12 * self.layers * self.width * sequence_tokens
