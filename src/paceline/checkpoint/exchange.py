"""How the ranks of a save tell each other short texts, outside the collectives of the training step."""

import threading
from datetime import timedelta
from typing import Protocol

from torch.distributed import DistStoreError, PrefixStore, Store


class Exchange(Protocol):
    """A shared table of texts, used from a background thread. One exchange serves one ``Checkpointer`` per rank."""

    def post(self, key: str, value: str) -> None:
        """Make ``value`` visible to all ranks under ``key``."""

    def collect(self, key_prefix: str, n: int, timeout_s: float) -> list[str]:
        """Wait for the values of ``key_prefix/0`` to ``key_prefix/{n-1}`` and return them in that order.

        Raises ``TimeoutError``, whose text names the keys that are missing, after ``timeout_s`` seconds.
        """

    def discard(self, key: str) -> None:
        """Forget a key this rank posted, which nobody will ask for again."""


class LocalExchange:
    """An exchange inside one process: for one rank, or for ranks that are threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def post(self, key: str, value: str) -> None:
        """See ``Exchange``."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def collect(self, key_prefix: str, n: int, timeout_s: float) -> list[str]:
        """See ``Exchange``."""
        keys = [f"{key_prefix}/{i}" for i in range(n)]
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self._values for key in keys), timeout_s):
                missing = [key for key in keys if key not in self._values]
                raise TimeoutError(f"nothing came within {timeout_s:g} s for {', '.join(missing)}")
            return [self._values[key] for key in keys]

    def discard(self, key: str) -> None:
        """See ``Exchange``."""
        with self._changed:
            self._values.pop(key, None)


class StoreExchange:
    """An exchange through a store, over a connection of its own: waiting here keeps nobody else from the store."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = PrefixStore(name, store.clone())  # type: ignore[attr-defined]

    def post(self, key: str, value: str) -> None:
        """See ``Exchange``."""
        self._store.set(key, value)

    def collect(self, key_prefix: str, n: int, timeout_s: float) -> list[str]:
        """See ``Exchange``."""
        keys = [f"{key_prefix}/{i}" for i in range(n)]
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except DistStoreError:
            missing = [key for key in keys if not self._store.check([key])]
            raise TimeoutError(f"nothing came within {timeout_s:g} s for {', '.join(missing)}") from None
        return [self._store.get(key).decode() for key in keys]

    def discard(self, key: str) -> None:
        """See ``Exchange``."""
        self._store.delete_key(key)
