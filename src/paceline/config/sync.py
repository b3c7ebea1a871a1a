"""What the options of a sync say of it besides their values: the rest of the config has to go with that."""

from typing import Any

from paceline.config.options import Options


class SyncOptions(Options):
    """Base of the options of every sync: here of replicas that learn alone between exchanges, without servers.

    A strategy of which something else holds says so, by a property or a ``ClassVar`` of that name.
    """

    @property
    def keeps_equal(self) -> bool:
        """Whether replicas hold the same training state after every step; else each saves its own."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether replicas learn what one process with the whole batch would."""
        return self.keeps_equal

    @property
    def keeps_own(self) -> bool:
        """Whether each replica keeps something of its own beside the state that all have."""
        return False

    @property
    def in_rounds(self) -> bool:
        """Whether a step is a round: clients take steps of their own, one after the other, at each replica."""
        return False

    @property
    def claims(self) -> bool:
        """Whether replicas take what is next of the run, so that steps end where all meet."""
        return False

    @property
    def clips(self) -> bool:
        """Whether the strategy does what ``train.clip_norm`` asks for, because it has the sum whose norm that is."""
        return False

    @property
    def is_served(self) -> bool:
        """Whether it wants server processes: ``servers`` of them, with their ``durability``."""
        return False

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on without a replica that is gone: then nothing but servers is between replicas."""
        return False

    @property
    def sends_less(self) -> bool:
        """Whether ``wire_bytes`` is only the most that can be."""
        return False

    @property
    def sends_evenly(self) -> bool:
        """Whether every step sends as much as any other."""
        return self.keeps_equal

    def check(self, config: Any) -> None:
        """Raise ``PlanError`` for what does not go with the rest of the whole config."""
