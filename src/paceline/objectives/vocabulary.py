"""Logits of which each rank of an axis has those of some entries of the vocabulary.

Every rank holds equally many; behind the last entry of the vocabulary they are padding.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from paceline.comm.mesh import Axis


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyCut:
    """Which entries of the vocabulary this rank's logits are of."""

    axis: Axis
    vocabulary: int

    @property
    def rows(self) -> int:
        """Rows of every rank, padding among them."""
        return -(-self.vocabulary // self.axis.size)

    @property
    def start(self) -> int:
        """The first entry of this rank."""
        return min(self.axis.index * self.rows, self.vocabulary)

    @property
    def entries(self) -> int:
        """Entries of this rank; its further rows are padding. May be 0."""
        return min(self.rows, self.vocabulary - self.start)


def vocabulary_cut(model: nn.Module) -> VocabularyCut | None:
    """How the logits of a model are cut; None where they are whole."""
    cut: VocabularyCut | None = getattr(model, "vocabulary_cut", None)
    return cut


def gather_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """All logits (..., V) of what ``model`` gave; without a gradient. All ranks of the tensor axis call it together."""
    cut = vocabulary_cut(model)
    if cut is None:
        return logits
    return cut.axis.all_gather(logits.detach(), -1, where="logits")[..., : cut.vocabulary]
