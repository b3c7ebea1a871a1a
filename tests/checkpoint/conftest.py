from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from paceline.checkpoint import Checkpoint, Checkpointer, LocalExchange, TensorState, load

Save = Callable[..., Checkpoint]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save one step with one checkpointer per mapping in ``ranks`` and open it."""

    def run(
        ranks: Sequence[Mapping[str, TensorState]] | Mapping[str, TensorState],
        *,
        step: int = 100,
        values: Mapping[str, Any] | None = None,
        layout: Mapping[str, int] | None = None,
        folder: Path = tmp_path,
        **options: Any,
    ) -> Checkpoint:
        shares = [ranks] if isinstance(ranks, Mapping) else list(ranks)
        exchange = LocalExchange()
        writers = [
            Checkpointer(
                folder, rank=rank, ranks=len(shares), exchange=exchange, layout=layout or {}, timeout_s=20, **options
            )
            for rank in range(len(shares))
        ]
        for writer, share in zip(writers, shares, strict=True):
            writer.save(step, share, values or {})
        for writer in writers:
            writer.wait()
        return load(folder, step)

    return run
